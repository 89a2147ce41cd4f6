//! Bringing models in and taking them out: layouts, round trips, optimiser states, and files that must be refused.
//!
//! Files are made by a small writer of the older plain container, which shares nothing with the crate's own export.

use iddpm::checkpoint::{self, Checkpoint, Progress};
use iddpm::config::{Config, ModelConfig, Schedule, VarType};
use iddpm::import::tensor_file::{TensorFile, parse};
use iddpm::train::slots;
use iddpm::unet::Params;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// 8x8 pixels, two levels, attention at both, learned variance, heads of 16 channels.
fn config() -> Config {
    let model = ModelConfig {
        image_size: 8,
        in_channels: 3,
        out_channels: 6,
        model_channels: 32,
        num_res_blocks: 1,
        channel_mult: vec![1, 2],
        attention_resolutions: vec![1, 2],
        num_head_channels: Some(16),
        ..ModelConfig::default()
    };
    let mut c = Config { model, ..Config::default() };
    c.diffusion.var_type = VarType::LearnedRange;
    c.diffusion.noise_schedule = Schedule::Cosine;
    c
}

/// The flags that tell what the tensors of [`config`] do not.
const FLAGS: &[&str] = &[
    "--image_size",
    "8",
    "--num_head_channels",
    "16",
    "--diffusion_steps",
    "1000",
    "--noise_schedule",
    "cosine",
    "--rescale_timesteps",
    "True",
];

/// Different numbers everywhere.
fn flat(params: &Params) -> Vec<f32> {
    let mut flat = vec![0.0; params.len];
    for p in &params.list {
        for (i, x) in flat[p.offset..p.offset + p.len()].iter_mut().enumerate() {
            *x = (p.offset + i) as f32 * 1e-6 - 0.01;
        }
    }
    flat
}

fn saved(folder: &Path, config: &Config) -> (PathBuf, Params, Vec<f32>) {
    let params = Params::new(&config.model);
    let flat = flat(&params);
    let path = folder.join("ours.safetensors");
    let progress = Progress { step: 0, images: 0, position: 0, config: config.clone() };
    checkpoint::save_parts(&path, &progress, &["model".into()], &slots(&params), |_, i| {
        let p = &params.list[i];
        Ok(flat[p.offset..p.offset + p.len()].to_vec())
    })
    .unwrap();
    (path, params, flat)
}

fn iddpm(folder: &Path, args: &[&str]) -> Output {
    // At run time first: the tests also run where they were not built.
    let program = std::env::var_os("CARGO_BIN_EXE_iddpm").unwrap_or_else(|| env!("CARGO_BIN_EXE_iddpm").into());
    Command::new(program).current_dir(folder).args(args).output().unwrap()
}

fn succeed(folder: &Path, args: &[&str]) -> String {
    let out = iddpm(folder, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap() + &String::from_utf8(out.stderr).unwrap()
}

/// The one message of a failure by the user's mistake.
fn refused(folder: &Path, args: &[&str]) -> String {
    let out = iddpm(folder, args);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn weights(path: &Path, params: &Params) -> Vec<f32> {
    Checkpoint::open(path).unwrap().weights(&slots(params), params.len).unwrap()
}

#[test]
fn export_and_import_return_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let (_, params, flat) = saved(at, &config());
    for (name, flags) in [("a.pt", FLAGS), ("b.safetensors", &[]), ("folder", &[])] {
        succeed(at, &["export", "ours.safetensors", "--to", name]);
        let to = format!("{name}-back.safetensors");
        let mut args = vec!["import", name, "--to", &to];
        args.extend(flags);
        let text = succeed(at, &args);
        assert!(text.contains("finite"), "{text}");
        assert_eq!(weights(&at.join(&to), &params), flat, "{name}");
        let mut found = Checkpoint::open(&at.join(&to)).unwrap().progress.config;
        found.model.num_heads = config().model.num_heads;
        assert_eq!((found.model, found.diffusion), (config().model, config().diffusion), "{name}");
    }
    // The settings of the folder alone, without the configuration that the weights carry, tell the same network.
    let weights_file = at.join("folder/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&weights_file).unwrap();
    let st = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let plain = safetensors::serialize(st.iter(), None).unwrap();
    std::fs::write(&weights_file, plain).unwrap();
    succeed(at, &["import", "folder", "--to", "plain.safetensors"]);
    assert_eq!(weights(&at.join("plain.safetensors"), &params), flat);
    let model = Checkpoint::open(&at.join("plain.safetensors")).unwrap().progress.config.model;
    assert_eq!(ModelConfig { num_heads: 4, num_heads_upsample: 4, ..model }, config().model);
}

#[test]
fn guided_networks_are_recognised() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let mut guided = config();
    guided.model.resblock_updown = true;
    guided.model.use_new_attention_order = true;
    guided.model.num_classes = Some(7);
    let (_, params, flat) = saved(at, &guided);
    succeed(at, &["export", "ours.safetensors", "--to", "guided.pt"]);
    let mut args = vec!["import", "guided.pt", "--to", "back.safetensors", "--use_new_attention_order", "True"];
    args.extend(FLAGS);
    succeed(at, &args);
    let model = Checkpoint::open(&at.join("back.safetensors")).unwrap().progress.config.model;
    assert_eq!(model, guided.model);
    assert_eq!(weights(&at.join("back.safetensors"), &params), flat);
    let text = refused(at, &["export", "ours.safetensors", "--to", "folder"]);
    assert!(text.contains("resblock-updown") && !at.join("folder").exists(), "{text}");
}

/// Our (out, kh, kw, in) against their (out, in, kh, kw), by the formula of the index.
#[test]
fn layouts_are_those_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let (_, params, flat) = saved(folder.path(), &config());
    succeed(folder.path(), &["export", "ours.safetensors", "--to", "m.pt"]);
    let file = TensorFile::open(&folder.path().join("m.pt")).unwrap();
    for p in &params.list {
        let t = file.get(&p.name).unwrap();
        let theirs = file.f32s(t).unwrap();
        let ours = &flat[p.offset..p.offset + p.len()];
        let conv_1d = p.name.ends_with("qkv.weight") || p.name.ends_with("proj_out.weight");
        match p.dims[..] {
            [o, h, w, i] => {
                assert_eq!(t.dims, if conv_1d { vec![o, i, 1] } else { vec![o, i, h, w] }, "{}", p.name);
                for (at, x) in theirs.iter().enumerate() {
                    let (kw, kh, ci, co) = (at % w, at / w % h, at / (w * h) % i, at / (w * h * i));
                    assert_eq!(*x, ours[((co * h + kh) * w + kw) * i + ci], "{} at {at}", p.name);
                }
            }
            _ => assert!(t.dims == p.dims && theirs == ours, "{}", p.name),
        }
    }
}

#[test]
fn missing_and_contradicting_settings_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    saved(at, &config());
    succeed(at, &["export", "ours.safetensors", "--to", "m.pt"]);
    let has = |args: &[&str], parts: &[&str]| {
        let text = refused(at, args);
        parts.iter().for_each(|p| assert!(text.contains(p), "{text:?} lacks {p:?}"));
        assert!(!at.join("m.safetensors").exists(), "nothing is written");
    };
    has(&["import", "m.pt"], &["m.pt", "--num-heads", "--noise-schedule", "--rescale-timesteps", "--preset"]);
    has(&["import", "m.pt", "--preset", "cifar10"], &["cifar10", "num-channels 128", "num-channels 32"]);
    let mut args = vec!["import", "m.pt", "--num_res_blocks", "2"];
    args.extend(FLAGS);
    has(&args, &["--num-res-blocks 2", "num-res-blocks 1"]);
    let args = ["--image_size", "8", "--num_heads", "7", "--diffusion_steps", "10", "--noise_schedule", "linear"];
    let mut args: Vec<&str> = ["import", "m.pt", "--rescale_timesteps", "0"].into_iter().chain(args).collect();
    has(&args, &["--num-heads 7", "32"]);
    args.truncate(2);
    args.push("m.pt");
    has(&args, &["one file of weights"]);
    has(&["import", "none.pt"], &["none.pt"]);
    has(&["import", "ours.safetensors", "--to", "x.safetensors"], &["already a checkpoint"]);
    has(&["import", "m.pt", "--to", "m.pt"], &["already there"]);
}

/// One entry of a state dict for [`plain_file`].
struct Given {
    name: String,
    storage: &'static str,
    dims: Vec<usize>,
    bytes: Vec<u8>,
}

fn put_text(p: &mut Vec<u8>, text: &str) {
    p.push(b'X');
    p.extend((text.len() as u32).to_le_bytes());
    p.extend(text.as_bytes());
}

fn put_number(p: &mut Vec<u8>, n: usize) {
    p.push(b'J');
    p.extend((n as i32).to_le_bytes());
}

fn put_tensor(p: &mut Vec<u8>, g: &Given, key: usize) {
    p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    put_text(p, "storage");
    p.extend(format!("ctorch\n{}\n", g.storage).bytes());
    put_text(p, &key.to_string());
    put_text(p, "cpu");
    put_number(p, g.dims.iter().product());
    p.extend(b"NtQK\0(");
    g.dims.iter().for_each(|&d| put_number(p, d));
    p.extend(b"t(");
    (0..g.dims.len()).for_each(|d| put_number(p, g.dims[d + 1..].iter().product()));
    p.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
}

/// The plain container around an object: magic, version, system, object, keys, storages.
fn container(object: &[u8], storages: &[Given]) -> Vec<u8> {
    let size = |s: &Given| match s.storage {
        "HalfStorage" => 2,
        _ => 4,
    };
    let mut out = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.".to_vec();
    out.extend(object);
    out.extend(b"\x80\x02](");
    (0..storages.len()).for_each(|i| put_text(&mut out, &i.to_string()));
    out.extend(b"e.");
    for s in storages {
        out.extend((s.bytes.len() as u64 / size(s)).to_le_bytes());
        out.extend(&s.bytes);
    }
    out
}

fn plain_file(tensors: &[Given]) -> Vec<u8> {
    let mut object = b"\x80\x02}(".to_vec();
    for (i, g) in tensors.iter().enumerate() {
        put_text(&mut object, &g.name);
        put_tensor(&mut object, g, i);
    }
    object.extend(b"u.");
    container(&object, tensors)
}

/// The state dict of [`config`] from its own export.
fn state_dict(folder: &Path) -> Vec<Given> {
    saved(folder, &config());
    succeed(folder, &["export", "ours.safetensors", "--to", "own.pt"]);
    let file = TensorFile::open(&folder.join("own.pt")).unwrap();
    let given = |(name, t): (&String, &iddpm::import::tensor_file::Tensor)| Given {
        name: name.clone(),
        storage: "FloatStorage",
        dims: t.dims.clone(),
        bytes: file.bytes(t),
    };
    file.tensors.iter().map(given).collect()
}

#[test]
fn every_wrong_tensor_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let tell = |change: &dyn Fn(&mut Vec<Given>)| {
        let mut tensors = state_dict(at);
        std::fs::remove_file(at.join("own.pt")).unwrap();
        change(&mut tensors);
        std::fs::write(at.join("m.pt"), plain_file(&tensors)).unwrap();
        let mut args = vec!["import", "m.pt", "--to", "x.safetensors"];
        args.extend(FLAGS);
        let text = refused(at, &args);
        assert!(!at.join("x.safetensors").exists() && text.contains("m.pt"), "{text}");
        text
    };
    let find = |v: &[Given], name: &str| v.iter().position(|g| g.name == name).unwrap();
    let text = tell(&|v| v.retain(|g| g.name != "out.0.bias"));
    assert!(text.contains("missing 1 (out.0.bias)"), "{text}");
    let text = tell(&|v| {
        let at = find(v, "out.0.bias");
        v[at].name = "out.9.bias".into();
    });
    assert!(text.contains("missing 1 (out.0.bias)") && text.contains("out.9.bias"), "{text}");
    let text = tell(&|v| {
        let at = find(v, "out.0.bias");
        v[at].dims = vec![16];
        v[at].bytes.truncate(64);
    });
    assert!(text.contains("out.0.bias") && text.contains("[32]") && text.contains("[16]"), "{text}");
    let text = tell(&|v| {
        let at = find(v, "out.0.bias");
        v[at].bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(text.contains("out.0.bias") && text.contains("NaN"), "{text}");
    let text = tell(&|v| {
        let at = find(v, "out.0.bias");
        (v[at].storage, v[at].bytes) = ("HalfStorage", vec![0; 64]);
    });
    assert!(text.contains("out.0.bias") && text.contains("float16") && text.contains("--allow-half"), "{text}");
    let text = tell(&|v| {
        let at = find(v, "out.0.bias");
        v[at].storage = "IntStorage";
    });
    assert!(text.contains("int32"), "{text}");
    let text = tell(&|v| v.iter_mut().for_each(|g| g.name = format!("module.{}", g.name)));
    assert!(text.contains("DataParallel"), "{text}");
    let text = tell(&|v| v.retain(|g| !g.name.starts_with("output_blocks")));
    assert!(text.contains("classifier"), "{text}");
}

#[test]
fn averages_and_optimiser_states_come_along() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let tensors = state_dict(at);
    std::fs::write(at.join("model000003.pt"), plain_file(&tensors)).unwrap();
    let times = |factor: f32| -> Vec<Given> {
        let scale = |b: &[u8]| (factor * f32::from_le_bytes(b.try_into().unwrap())).to_le_bytes();
        let scaled = |g: &Given| Given {
            name: g.name.clone(),
            storage: g.storage,
            dims: g.dims.clone(),
            bytes: g.bytes.chunks(4).flat_map(scale).collect(),
        };
        tensors.iter().map(scaled).collect()
    };
    std::fs::write(at.join("ema_0.99_000003.pt"), plain_file(&times(2.0))).unwrap();
    let params = Params::new(&config().model);
    let mut moments = [times(3.0), times(4.0)];
    let mut object = b"\x80\x02}(".to_vec();
    put_text(&mut object, "state");
    object.extend(b"}(");
    let mut storages = Vec::new();
    for (i, p) in params.list.iter().enumerate() {
        put_number(&mut object, i);
        object.extend(b"}(");
        put_text(&mut object, "step");
        put_number(&mut object, 3);
        for (moment, name) in moments.iter_mut().zip(["exp_avg", "exp_avg_sq"]) {
            put_text(&mut object, name);
            let at = moment.iter().position(|g| g.name == p.name).unwrap();
            put_tensor(&mut object, &moment[at], storages.len());
            storages.push(moment.remove(at));
        }
        object.extend(b"u");
    }
    object.extend(b"uu.");
    std::fs::write(at.join("opt000003.pt"), container(&object, &storages)).unwrap();

    let mut args = vec!["import", "opt000003.pt", "ema_0.99_000003.pt", "model000003.pt", "--to", "all.safetensors"];
    args.extend(FLAGS);
    succeed(at, &args);
    let c = Checkpoint::open(&at.join("all.safetensors")).unwrap();
    let slots = slots(&params);
    let flat = flat(&params);
    let scaled = |factor: f32| flat.iter().map(|x| factor * x).collect::<Vec<f32>>();
    assert_eq!((c.progress.step, c.progress.config.train.ema_rates.as_slice()), (3, &[0.99][..]));
    assert_eq!(c.weights(&slots, params.len).unwrap(), flat);
    assert_eq!(c.ema(0.99, &slots, params.len).unwrap(), scaled(2.0));
    let s = c.snapshot(&slots, params.len, &[("t".into(), true, 2)]).unwrap();
    assert_eq!((s.adam_m, s.adam_v, s.state[0].bytes.as_slice()), (scaled(3.0), scaled(4.0), &[0; 8][..]));

    let text = refused(at, &["import", "opt000003.pt"]);
    assert!(text.contains("one file of weights"), "{text}");
    let mut args = vec!["import", "opt000003.pt", "opt000003.pt", "model000003.pt"];
    args.extend(FLAGS);
    assert!(refused(at, &args).contains("second optimiser"));
}

/// Each pickle wants something that no tensor file needs; the message says what, and nothing happens.
#[test]
fn hostile_pickles_are_refused_and_not_run() {
    let marker = std::env::temp_dir().join(format!("iddpm-executed-{}", std::process::id()));
    let command = format!("touch {}", marker.display());
    let call = |module: &str, name: &str| {
        let mut p = format!("\x02c{module}\n{name}\n(").into_bytes();
        p.insert(0, 0x80);
        put_text(&mut p, &command);
        p.extend(b"tR.");
        p
    };
    let mut stack_global = vec![0x80, 4];
    put_text(&mut stack_global, "os");
    put_text(&mut stack_global, "system");
    stack_global.extend(b"\x93(");
    put_text(&mut stack_global, &command);
    stack_global.extend(b"tR.");
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (call("os", "system"), "os.system"),
        (call("posix", "system"), "posix.system"),
        (call("builtins", "eval"), "builtins.eval"),
        (call("torch", "load"), "torch.load"),
        (call("collections", "OrderedDict.fromkeys"), "OrderedDict.fromkeys"),
        (call("torch", "FloatStorage"), "no part of a tensor file"),
        (stack_global, "os.system"),
        (b"\x80\x02(Vtouch x\nios\nsystem\n.".to_vec(), "0x56"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.".to_vec(), "0x81"),
        (b"\x80\x02K\x01}b.".to_vec(), "attributes"),
        (b"\x80\x02h\x07.".to_vec(), "kept as 7"),
        (b"\x80\x02.".to_vec(), "without a value"),
        (b"\x80\x02]K\x01K\x02u.".to_vec(), "mark"),
        (b"\x80\x02X\xff\xff\xff\xff.".to_vec(), "truncated"),
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.".to_vec(), "truncated"),
        (b"\x80\x09.".to_vec(), "protocol 9"),
        ([b"\x80\x02".to_vec(), b"N".repeat(3 << 20), b".".to_vec()].concat(), "values"),
        ([b"\x80\x02N".to_vec(), b"2".repeat(9 << 20), b".".to_vec()].concat(), "operations"),
        // A list inside itself, and sixty levels of two references each.
        (b"\x80\x02]q\0h\0a.".to_vec(), "nested"),
        ([b"\x80\x02N".to_vec(), b"2\x86".repeat(60), b".".to_vec()].concat(), "nested"),
        // One large list, named again and again.
        (
            [b"\x80\x02](".to_vec(), b"N".repeat(4000), b"eq\0(".to_vec(), b"h\0".repeat(4000), b"l.".to_vec()]
                .concat(),
            "nested",
        ),
        // One large list made into a dict again and again.
        (
            [
                b"\x80\x02NN\x86q\x02](".to_vec(),
                b"h\x02".repeat(4000),
                b"eq\0ccollections\nOrderedDict\nq\x01(".to_vec(),
                b"h\x01h\0\x85R".repeat(4000),
                b"l.".to_vec(),
            ]
            .concat(),
            "dicts of more than",
        ),
    ];
    for (object, part) in cases {
        let text = parse(&container(&object, &[])).map(|_| ()).expect_err(part);
        assert!(text.contains(part), "{text:?} lacks {part:?}");
        assert!(!marker.exists(), "{part}: code was executed");
    }
}

/// A size made from one long tuple again and again is the tuple itself: copies would fill hundreds of gigabytes.
#[test]
fn a_long_tuple_is_not_copied() {
    let sizes = b"h\x01h\0\x85R".repeat(100_000);
    let head = [b"\x80\x02(".to_vec(), b"K\x07".to_vec(), b"2".repeat(400_000)].concat();
    let object = [head, b"tq\0ctorch\nSize\nq\x01(".to_vec(), sizes, b"l0}.".to_vec()].concat();
    assert!(parse(&container(&object, &[])).unwrap().tensors.is_empty());
}

/// A tensor without elements may have any other sizes; their product is not one.
#[test]
fn sizes_beside_a_zero_are_refused() {
    let header = br#"{"w":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}"#;
    let file = [&(header.len() as u64).to_le_bytes()[..], header].concat();
    let text = parse(&file).map(|_| ()).unwrap_err();
    assert!(text.contains("w: a tensor of size [0, 1099511627776"), "{text}");
}

/// Sizes, strides and storages that do not lie inside the file.
#[test]
fn hostile_tensors_are_refused() {
    let tensor = |elements: i32, offset: i32, dims: &[i32], strides: &[i32], bytes: usize, claimed: u64| {
        let mut o = b"\x80\x02}".to_vec();
        put_text(&mut o, "w");
        o.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        put_text(&mut o, "storage");
        o.extend(b"ctorch\nFloatStorage\n");
        put_text(&mut o, "0");
        put_text(&mut o, "cpu");
        let number = |o: &mut Vec<u8>, n: i32| {
            o.push(b'J');
            o.extend(n.to_le_bytes());
        };
        number(&mut o, elements);
        o.extend(b"NtQ");
        number(&mut o, offset);
        for sizes in [dims, strides] {
            o.push(b'(');
            sizes.iter().for_each(|&n| number(&mut o, n));
            o.push(b't');
        }
        o.extend(b"\x89}tRs.");
        let mut file = container(&o, &[]);
        file.truncate(file.len() - b"\x80\x02](e.".len());
        file.extend(b"\x80\x02](");
        put_text(&mut file, "0");
        file.extend(b"e.");
        file.extend(claimed.to_le_bytes());
        file.resize(file.len() + bytes, 0);
        parse(&file).map(|f| f.tensors["w"].len())
    };
    assert_eq!(tensor(6, 0, &[2, 3], &[3, 1], 24, 6), Ok(6));
    assert_eq!(tensor(6, 5, &[1000, 1000], &[0, 0], 24, 6), Ok(1_000_000));
    let big = i32::MAX;
    for (elements, offset, dims, strides, bytes, claimed) in [
        (6, 0, &[2, 4][..], &[4, 1][..], 24, 6),
        (6, 6, &[1], &[1], 24, 6),
        (6, 0, &[2], &[big], 24, 6),
        (6, 0, &[big, big, big], &[1, 1, 1], 24, 6),
        (6, 0, &[big, big], &[0, 0], 24, 6),
        (6, 0, &[-1], &[1], 24, 6),
        (6, 0, &[2], &[-1], 24, 6),
        (6, -1, &[2], &[1], 24, 6),
        (6, 0, &[2, 3], &[1], 24, 6),
        (6, 0, &[1; 17], &[1; 17], 24, 6),
        (-6, 0, &[2], &[1], 24, 6),
        (7, 0, &[2, 3], &[3, 1], 24, 6),
        (6, 0, &[2, 3], &[3, 1], 23, 6),
        (6, 0, &[2, 3], &[3, 1], 24, u64::MAX / 4),
    ] {
        let text = tensor(elements, offset, dims, strides, bytes, claimed).expect_err("a hostile tensor");
        assert!(!text.is_empty());
    }
}

fn golden(name: &str) -> Vec<u8> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    std::fs::read(Path::new(&root).join("tests/golden/11_pt").join(name)).unwrap()
}

#[test]
fn hostile_archives_are_refused() {
    let good = golden("nested_zip.pt");
    assert!(parse(&good).is_ok());
    let directory = good.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let second = directory + 4 + good[directory + 4..].windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    let end = good.windows(4).rposition(|w| w == b"PK\x05\x06").unwrap();
    let tell = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&file).map(|_| ()).expect_err("a hostile archive")
    };
    let cases = [
        (tell(directory + 8, &[9, 8]), "encrypted"),
        (tell(directory + 10, &[8, 0]), "compressed"),
        (tell(directory + 24, &[0xf0, 0xff, 0xff, 0x7f]), "bytes"),
        (tell(directory + 42, &[9, 0, 0, 0]), "local header"),
        (tell(second + 42, &[0, 0, 0, 0]), "overlap"),
        (tell(end + 4, &[1, 0]), "several files"),
        (tell(end + 12, &[0xff, 0xff, 0, 0]), "directory"),
        (tell(end + 10, &[0xff, 0x7f]), "zip"),
        (tell(200, &[0x55]), "checksum"),
    ];
    for (text, part) in cases {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

/// No prefix of a file is read as if it were whole, and none makes the reader panic.
#[test]
fn truncated_files_are_refused() {
    for name in ["nested_zip.pt", "nested_legacy.pt", "mixed_legacy.pt", "nested_expected.safetensors"] {
        let file = golden(name);
        assert!(parse(&file).is_ok(), "{name}");
        for len in 0..file.len() {
            assert!(parse(&file[..len]).is_err(), "{name}: {len} of {} bytes were accepted", file.len());
        }
    }
}
