//! One error type for everything a user or the machine can cause.
//!
//! Messages name the file, the field and both values, and end with the way out. What only a bug can cause is an
//! `assert!`, not an error.

use std::path::{Path, PathBuf};

/// Result of every fallible function of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. [`Error::exit_code`] tells a user's mistake (2) from a failure (1).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, a setting or a combination of them that cannot be used.
    #[error("{0}")]
    Config(String),
    /// Images, labels or a data folder that cannot be used.
    #[error("{}: {what}", path.display())]
    Data {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong, with the values, and the remedy.
        what: String,
    },
    /// A checkpoint or another model file that is damaged, foreign or does not fit.
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong, with the values, and the remedy.
        what: String,
    },
    /// The operating system refused to read or write.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: "read", "write", "create".
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// NaN or infinity where a number was due; names the step and the place.
    #[error("{0}")]
    NonFinite(String),
    /// The device cannot do what was asked: no driver, no memory, no kernel for a shape, a failed launch.
    #[error("{0}")]
    Device(String),
    /// A signal asked the run to stop; what was saved is in the text.
    #[error("{0}")]
    Interrupted(String),
}

impl Error {
    /// A mistake in the data at `path`.
    pub fn data(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().into(), what: what.into() }
    }

    /// A mistake in the checkpoint at `path`.
    pub fn checkpoint(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.as_ref().into(), what: what.into() }
    }

    /// A failed system call on `path`; use as `.map_err(Error::io(path, "read"))`.
    pub fn io(path: impl AsRef<Path>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, action, source }
    }

    /// Process exit code: 2 for what the user can mend, 1 for a failure, 130 after an interruption.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Config(_) | Error::Data { .. } | Error::Checkpoint { .. } => 2,
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => 2,
            Error::Io { .. } | Error::NonFinite(_) | Error::Device(_) => 1,
            Error::Interrupted(_) => 130,
        }
    }
}
