//! Identities of the process, the losses, the samplers and the choice of t that hold whatever the reference says.

mod losses;
mod process;
mod solvers;
mod timestep;
mod walks;

use iddpm::config::Schedule;
use iddpm::schedule::{Process, space_timesteps};

/// Processes of every schedule, long and short, one of them respaced.
fn processes() -> Vec<Process> {
    let mut all = vec![];
    for steps in [25, 100, 1000, 4000] {
        all.push(Process::new(Schedule::Linear, steps).unwrap());
    }
    for steps in [2, 4, 10, 100, 1000, 4000] {
        all.push(Process::new(Schedule::Cosine, steps).unwrap());
    }
    for steps in [2, 10, 1000] {
        all.push(Process::new(Schedule::Sigmoid, steps).unwrap());
    }
    let base = Process::new(Schedule::Cosine, 4000).unwrap();
    all.push(base.respace(&space_timesteps(4000, "100").unwrap()).unwrap());
    all
}

/// The text of an error that a user can mend.
fn message(result: iddpm::error::Result<impl std::fmt::Debug>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}
