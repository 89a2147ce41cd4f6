//! Golden vectors: numbers of the PyTorch reference, each compared with the tolerance its index states.
//!
//! `IDDPM_GOLDEN` names a folder of vector files with their `index.json`; without it the folder `tests/golden` of the crate
//! is read. File names start with their kind ([`KINDS`]); shapes, cases and settings come from the files themselves, so another
//! folder with other seeds, sizes and cases is checked by the same code. A file of no known kind, a vector file without an index
//! entry, and a result that no check compared are errors.

mod architectures;
mod codes;
#[cfg(feature = "emulator")]
mod emulated;
mod gaussian;
mod likelihood;
mod losses;
mod ops;
mod pickles;
pub mod pieces;
mod samplers;
mod schedules;
pub mod tensors;
mod timestep;
pub mod training;
pub mod unet;
pub mod vectors;

use std::path::{Path, PathBuf};

use crate::device::device;
use iddpm::device::Device;
use vectors::{Folder, VectorFile};

/// Makes a device.
pub type Open<'a> = &'a dyn Fn() -> Device;

/// Compares everything one file holds.
type Check = fn(&VectorFile);

/// Every kind of vector file, by the start of its name, and the check of its whole content.
const KINDS: &[(&str, Check)] = &[
    ("01_schedules", schedules::schedules),
    ("02_respacing", schedules::respacing),
    ("03_gaussian", gaussian::check),
    ("04_losses", losses::check),
    ("05_likelihood", likelihood::check),
    ("06_samplers", samplers::check),
    ("07_bpd", samplers::bound),
    ("08_timestep_samplers", timestep::check),
    ("09_layers", |file| pieces::layers(file, &device)),
    ("09_resblocks", |file| pieces::resblocks(file, &device)),
    ("09_attention", |file| pieces::attention(file, &device)),
    ("10_unet_", |file| unet::unet(file, &device)),
    ("10_superres", |file| unet::super_resolution(file, &device)),
    ("10_adamw_ema", |file| training::adamw_ema(file, &device)),
    ("10_training", |file| training::training(file, &device)),
    ("12_image_codes", codes::check),
];

/// What a folder may also hold, unread here, and why.
const UNREAD: &[(&str, &str)] = &[
    ("11_pt", "read by pickles_match_the_reference"),
    ("12_architectures.json", "read by architectures_match_the_reference"),
    ("INDEX.md", "prose"),
    ("index.json", "read by every check"),
];

/// Kinds that the crate's own folder always holds.
const CARRIED: &[&str] = &[
    "01_schedules",
    "02_respacing",
    "03_gaussian",
    "04_losses",
    "05_likelihood",
    "06_samplers",
    "07_bpd",
    "08_timestep_samplers",
    "09_layers",
    "09_resblocks",
    "09_attention",
    "10_unet_",
    "10_adamw_ema",
    "12_image_codes",
];

/// The folder of vectors in use.
fn folder() -> PathBuf {
    std::env::var_os("IDDPM_GOLDEN").map_or_else(carried_folder, PathBuf::from)
}

/// The folder the crate carries: beside the manifest of the running test, else of the one that was built.
fn carried_folder() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join("tests/golden")
}

/// Checks every file of one kind in the folder.
fn check_kind(kind: &str) {
    let (_, check) = KINDS.iter().find(|(name, _)| *name == kind).expect("a kind of the table");
    let folder = Folder::open(&folder());
    for name in folder.vector_files().filter(|name| name.starts_with(kind)) {
        let file = folder.load(name);
        check(&file);
        file.finish();
    }
}

macro_rules! kinds {
    ($($test:ident $kind:literal),+ $(,)?) => {
        $(#[test] fn $test() { check_kind($kind); })+

        #[test]
        fn every_kind_has_a_test() {
            assert_eq!([$($kind),+].as_slice(), KINDS.iter().map(|(kind, _)| *kind).collect::<Vec<_>>());
        }
    };
}

kinds! {
    schedules_match_the_reference "01_schedules",
    respacing_matches_the_reference "02_respacing",
    gaussian_matches_the_reference "03_gaussian",
    losses_match_the_reference "04_losses",
    likelihood_matches_the_reference "05_likelihood",
    samplers_match_the_reference "06_samplers",
    bound_matches_the_reference "07_bpd",
    timestep_samplers_match_the_reference "08_timestep_samplers",
    layers_match_the_reference "09_layers",
    resblocks_match_the_reference "09_resblocks",
    attention_matches_the_reference "09_attention",
    unet_matches_the_reference "10_unet_",
    super_resolution_matches_the_reference "10_superres",
    adamw_ema_matches_the_reference "10_adamw_ema",
    training_matches_the_reference "10_training",
    image_codes_match_the_reference "12_image_codes",
}

#[test]
fn architectures_match_the_reference() {
    let path = folder().join("12_architectures.json");
    if path.exists() {
        architectures::check(&path);
    }
}

#[test]
fn pickles_match_the_reference() {
    let pickles = folder().join("11_pt");
    if pickles.exists() {
        pickles::check(&pickles);
    }
}

#[test]
fn every_file_belongs_to_a_kind() {
    let path = folder();
    let folder = Folder::open(&path);
    let known = |name: &str| {
        UNREAD.iter().any(|(start, _)| name.starts_with(start))
            || (name.ends_with(".safetensors") && KINDS.iter().any(|(kind, _)| name.starts_with(kind)))
    };
    let foreign: Vec<&String> = folder.entries().iter().filter(|name| !known(name)).collect();
    assert!(foreign.is_empty(), "{}: files of no known kind: {foreign:?}", path.display());
    assert!(folder.vector_files().next().is_some(), "{}: no vector files", path.display());
}

#[test]
fn the_crate_carries_its_vectors() {
    let folder = Folder::open(&carried_folder());
    for kind in CARRIED {
        assert!(folder.vector_files().any(|name| name.starts_with(kind)), "tests/golden holds no {kind} file");
    }
}

/// The steps of the diffusion process as ops on devices made by `device`, against the files that say what they compute.
pub fn check_ops(device: Open) {
    let folder = Folder::open(&folder());
    for name in folder.vector_files() {
        if let Some((_, check)) = ops::KINDS.iter().find(|(kind, _)| name.starts_with(kind)) {
            let file = folder.load(name);
            check(&file, device);
            file.finish_part();
        }
    }
}

#[test]
fn ops_match_the_reference() {
    check_ops(&device);
}

/// Copies of a small file with one thing wrong each: what must not pass does not.
mod planted_faults {
    use std::fs;
    use std::panic::catch_unwind;

    use super::*;

    const NAME: &str = "12_image_codes.safetensors";

    /// Runs `check` on a copy of one file of the crate's folder after `spoil(bytes, index)`; the message of its panic.
    fn failure(spoil: impl Fn(&mut Vec<u8>, &mut serde_json::Value), check: Check) -> String {
        let temporary = tempfile::tempdir().unwrap();
        let mut bytes = fs::read(carried_folder().join(NAME)).unwrap();
        let text = fs::read_to_string(carried_folder().join("index.json")).unwrap().replace("Infinity", "null");
        let mut index: serde_json::Value = serde_json::from_str(&text).unwrap();
        index["files"].as_array_mut().unwrap().retain(|file| file["file"] == NAME);
        spoil(&mut bytes, &mut index);
        fs::write(temporary.path().join(NAME), &bytes).unwrap();
        fs::write(temporary.path().join("index.json"), index.to_string()).unwrap();
        let path = temporary.path().to_path_buf();
        let run = catch_unwind(move || {
            let file = Folder::open(&path).load(NAME);
            check(&file);
            file.finish();
        });
        match run {
            Ok(()) => String::new(),
            Err(panic) => panic.downcast_ref::<String>().cloned().expect("a message"),
        }
    }

    #[test]
    fn the_copy_itself_passes() {
        assert_eq!(failure(|_, _| (), codes::check), "");
    }

    #[test]
    fn a_changed_number_is_found_and_named() {
        // The last byte of the file belongs to the last tensor.
        let text = failure(|bytes, _| *bytes.last_mut().unwrap() ^= 1, codes::check);
        for part in [NAME, "1 of", "got", "expected", "tolerance"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn an_unchecked_result_is_found() {
        assert!(failure(|_, _| (), |_| ()).contains("levels/back: no check compares it"));
    }

    #[test]
    fn a_wrong_length_is_found() {
        let text = failure(|_, _| (), |file| file.compare("levels/x", &[1.0]));
        assert!(text.contains("levels/x: 1 elements, expected 256"), "{text}");
    }

    #[test]
    fn a_file_without_an_entry_is_refused() {
        let text = failure(|_, index| index["files"] = serde_json::json!([]), codes::check);
        assert!(text.contains("no entry in index.json"), "{text}");
    }

    #[test]
    fn a_tensor_without_an_entry_is_refused() {
        let text = failure(|_, index| drop(index["files"][0]["tensors"].as_array_mut().unwrap().pop()), codes::check);
        assert!(text.contains("has no entry"), "{text}");
    }

    #[test]
    fn a_tensor_that_is_missing_or_of_another_shape_is_refused() {
        let text =
            failure(|_, index| index["files"][0]["tensors"][0]["shape"] = serde_json::json!([2, 128]), codes::check);
        assert!(text.contains("the index says float32 [2, 128]"), "{text}");
        let renamed = |_: &mut Vec<u8>, index: &mut serde_json::Value| {
            let tensors = index["files"][0]["tensors"].as_array_mut().unwrap();
            let mut another = tensors[0].clone();
            another["name"] = "another".into();
            tensors.push(another);
        };
        assert!(failure(renamed, codes::check).contains("tensor another of index.json is not in the file"));
    }

    #[test]
    fn an_unknown_tolerance_or_role_is_refused() {
        let text = failure(
            |_, index| index["files"][0]["tensors"][0]["tol"] = serde_json::json!({"mode": "loose"}),
            codes::check,
        );
        assert!(text.contains("unknown tolerance"), "{text}");
        let text = failure(|_, index| index["files"][0]["tensors"][0]["role"] = "hint".into(), codes::check);
        assert!(text.contains("unknown role hint"), "{text}");
    }
}
