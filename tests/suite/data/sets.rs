//! Every kind of set: order, labels, splits, limits, and the same pixels by every way in.

use iddpm::data::{self, DataSpec, Labels, Split};

use super::{gzip, idx, noise, tar_of, write_png};

/// A folder with nested images of 8x8x3 in which the order of folder entries is not the order of whole paths (`-` sorts before `/`).
fn nested() -> (tempfile::TempDir, Vec<&'static str>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let names = vec!["a/x_1.png", "a/y_0.png", "a/z/w_2.png", "a-cat.PNG", "a0_0.png", "b.png"];
    let pixels = names.iter().enumerate();
    let pixels = pixels.flat_map(|(i, n)| write_png(&folder.path().join(n), [8, 8, 3], i as u32)).collect();
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    std::fs::write(folder.path().join("a/._x_1.png"), "a resource fork").unwrap();
    (folder, names, pixels)
}

#[test]
fn a_folder_is_read_in_the_references_order() {
    let (folder, names, pixels) = nested();
    let set = data::open(&DataSpec::new(folder.path())).unwrap();
    assert_eq!((set.n, set.h, set.w, set.c), (6, 8, 8, 3));
    assert_eq!(set.source.first_names, names[..5]);
    assert_eq!(set.source.skipped, 2);
    assert!(set.pixels == pixels);
    assert_eq!(set.image(4), &pixels[4 * 192..5 * 192]);
}

#[test]
fn tar_and_threads_change_nothing() {
    let (folder, names, pixels) = nested();
    let shuffled = [names[4], "notes.txt", names[0], names[5], names[2], names[3], names[1]];
    let bytes = tar_of(folder.path(), &shuffled);
    for (name, bytes) in [("set.tar", bytes.clone()), ("set.tgz", gzip(&bytes))] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        for threads in [None, Some(1), Some(3)] {
            let set = data::open(&DataSpec { threads, ..DataSpec::new(&path) }).unwrap();
            assert!(set.pixels == pixels, "{name} with {threads:?} threads");
            assert_eq!(set.source.first_names, names[..5]);
        }
    }
}

/// More images than are decoded at a time.
#[test]
fn many_images_keep_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let one = |i: usize| write_png(&folder.path().join(format!("{:03}.png", i)), [2, 2, 1], i as u32);
    let pixels: Vec<u8> = (0..150).flat_map(one).collect();
    let set = data::open(&DataSpec::new(folder.path())).unwrap();
    assert_eq!((set.n, set.c), (150, 1));
    assert_eq!(set.pixels, pixels);
    let some = data::open(&DataSpec { limit: Some(4), ..DataSpec::new(folder.path()) }).unwrap();
    let kept: Vec<u8> = [0, 37, 75, 112].iter().flat_map(|i| &pixels[i * 4..i * 4 + 4]).copied().collect();
    assert_eq!((some.n, some.source.found), (4, 150));
    assert_eq!(some.pixels, kept);
}

#[test]
fn labels_come_from_prefix_or_folder() {
    let folder = tempfile::tempdir().unwrap();
    for (i, name) in ["dog_1.png", "ant_7.png", "cat_2.png", "dog_0.png", "ant_xy.png", "cat_.png"].iter().enumerate() {
        write_png(&folder.path().join("flat").join(name), [4, 4, 1], i as u32);
        write_png(&folder.path().join("deep").join(name.replacen('_', "/_", 1)), [4, 4, 1], i as u32);
    }
    let open = |name, labels| data::open(&DataSpec { labels, ..DataSpec::new(folder.path().join(name)) }).unwrap();
    for labels in [Labels::Auto, Labels::Prefix] {
        let flat = open("flat", labels);
        assert_eq!(flat.classes, ["ant", "cat", "dog"]);
        assert_eq!(flat.labels.as_deref(), Some(&[0, 0, 1, 1, 2, 2][..]));
    }
    let deep = open("deep", Labels::Auto);
    assert_eq!(deep.classes, ["ant", "cat", "dog"]);
    assert_eq!(deep.labels.as_deref(), Some(&[0, 0, 1, 1, 2, 2][..]));
    assert_eq!(open("flat", Labels::None).labels, None);
    let all = open("", Labels::Folder);
    assert_eq!(all.classes, ["ant", "cat", "dog", "flat"], "the innermost folder names the class");
}

#[test]
fn auto_labels_need_names_that_look_like_classes() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["one/0_a.png", "one/1_b.png", "one/2_c.png", "two/img_1.png", "two/img_2.png"] {
        write_png(&folder.path().join(name), [4, 4, 1], 1);
    }
    for part in ["one", "two"] {
        let set = data::open(&DataSpec::new(folder.path().join(part))).unwrap();
        assert_eq!(set.labels, None, "{part}");
    }
}

#[test]
fn train_and_test_folders_are_splits() {
    let folder = tempfile::tempdir().unwrap();
    let names = [
        "set/test/cat_0.png",
        "set/train/cat_0.png",
        "set/train/cat_1.png",
        "set/train/dog_0.png",
        "set/train/dog_1.png",
    ];
    for (i, name) in names.iter().enumerate() {
        write_png(&folder.path().join(name), [4, 4, 3], i as u32);
    }
    let path = folder.path().join("set.tar.gz");
    std::fs::write(&path, gzip(&tar_of(folder.path(), &names))).unwrap();
    for path in [folder.path().join("set"), path] {
        let open = |split| data::open(&DataSpec { split, ..DataSpec::new(&path) }).unwrap();
        let train = open(Split::Train);
        assert_eq!((train.n, train.classes.join(" ")), (4, "cat dog".into()));
        assert_eq!(open(Split::Test).n, 1);
        assert_eq!(open(Split::Test).pixels, noise(4, 4, 3, 0));
        assert_eq!(open(Split::All).n, 5);
    }
}

#[test]
fn idx_files_with_and_without_gzip() {
    let folder = tempfile::tempdir().unwrap();
    let (train, test) = (noise(3 * 6, 6, 1, 1), noise(2 * 6, 6, 1, 2));
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("train-images-idx3-ubyte.gz", &gzip(&idx(&[3, 6, 6], &train)));
    write("train-labels-idx1-ubyte.gz", &gzip(&idx(&[3], &[4, 0, 2])));
    write("t10k-images-idx3-ubyte", &idx(&[2, 6, 6], &test));
    write("t10k-labels-idx1-ubyte", &idx(&[2], &[1, 1]));
    let open = |name: &str, split| data::open(&DataSpec { split, ..DataSpec::new(folder.path().join(name)) }).unwrap();
    let set = open("", Split::Train);
    assert_eq!((set.n, set.h, set.w, set.c), (3, 6, 6, 1));
    assert_eq!((set.pixels, set.labels), (train.clone(), Some(vec![4, 0, 2])));
    assert_eq!(set.classes, ["0", "1", "2", "3", "4"]);
    assert_eq!(open("", Split::Test).labels, Some(vec![1, 1]));
    let all = open("", Split::All);
    assert_eq!((all.n, all.labels), (5, Some(vec![4, 0, 2, 1, 1])));
    assert_eq!(all.pixels, [train, test.clone()].concat());
    assert_eq!(open("t10k-images-idx3-ubyte", Split::Train).pixels, test);
    let spec =
        DataSpec { image_size: Some(12), channels: Some(3), labels: Labels::None, ..DataSpec::new(folder.path()) };
    let set = data::open(&spec).unwrap();
    assert_eq!((set.h, set.w, set.c, set.labels), (12, 12, 3, None));
    assert!(set.pixels.chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]));
}

/// Records of CIFAR with planes 10, 20, 30 plus the pixel's number modulo 7.
fn cifar(labels: &[&[u8]]) -> Vec<u8> {
    let record = |l: &&[u8]| {
        let planes = (0..3072usize).map(|i| (10 * (i / 1024 + 1) + i % 1024 % 7) as u8);
        l.iter().copied().chain(planes).collect::<Vec<_>>()
    };
    labels.iter().flat_map(record).collect()
}

#[test]
fn cifar_binary_files() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("cifar-10-batches-bin");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("data_batch_2.bin"), cifar(&[&[3]])).unwrap();
    std::fs::write(root.join("data_batch_1.bin"), cifar(&[&[9], &[0]])).unwrap();
    std::fs::write(root.join("test_batch.bin"), cifar(&[&[7]])).unwrap();
    let names = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    std::fs::write(root.join("batches.meta.txt"), names).unwrap();
    let files = ["test_batch.bin", "data_batch_2.bin", "batches.meta.txt", "data_batch_1.bin"];
    let files = files.map(|f| format!("cifar-10-batches-bin/{f}"));
    let archive = folder.path().join("cifar-10-binary.tar.gz");
    std::fs::write(&archive, gzip(&tar_of(folder.path(), &files.each_ref().map(String::as_str)))).unwrap();
    for path in [root.clone(), archive] {
        let set = data::open(&DataSpec::new(&path)).unwrap();
        assert_eq!((set.n, set.h, set.w, set.c), (3, 32, 32, 3));
        assert_eq!(set.labels, Some(vec![9, 0, 3]), "{}", path.display());
        assert_eq!(set.image(1)[..9], [10, 20, 30, 11, 21, 31, 12, 22, 32], "{}", path.display());
        assert_eq!(set.classes[3], "cat");
        let test = data::open(&DataSpec { split: Split::Test, ..DataSpec::new(&path) }).unwrap();
        assert_eq!(test.labels, Some(vec![7]));
    }
    let one = data::open(&DataSpec::new(root.join("test_batch.bin"))).unwrap();
    assert_eq!((one.n, one.classes[7].as_str()), (1, "horse"));
    let hundred = folder.path().join("train.bin");
    std::fs::write(&hundred, cifar(&[&[19, 99], &[3, 50]])).unwrap();
    let set = data::open(&DataSpec::new(&hundred)).unwrap();
    assert_eq!((set.labels, set.classes.len()), (Some(vec![99, 50]), 100));
}

#[test]
fn the_built_in_digits_are_mnist() {
    let set = data::open(&DataSpec::default()).unwrap();
    assert_eq!((set.n, set.h, set.w, set.c), (10_000, 16, 16, 1));
    let labels = set.labels.as_deref().unwrap();
    assert_eq!(labels[..10], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]);
    for class in 0..10 {
        let count = labels.iter().filter(|&&l| l == class).count();
        assert!((850..1150).contains(&count), "{count} images of {class}");
    }
    let mean = set.pixels.iter().map(|&p| f64::from(p)).sum::<f64>() / set.pixels.len() as f64;
    let padded = 33.3184 * (28.0f64 / 32.0).powi(2);
    assert!((mean - padded).abs() < 0.5, "mean {mean}, of all 60,000 training images {padded}");
    assert_eq!(data::open(&DataSpec::new("digits")).unwrap().fingerprint(), set.fingerprint());
    assert!(data::LICENCE.contains("CC BY-SA 3.0"));
}

#[test]
fn batches_visit_every_image_once_per_epoch_and_resume_anywhere() {
    let spec = DataSpec { limit: Some(10), ..DataSpec::default() };
    let set = data::open(&spec).unwrap();
    let mut walk = set.batches(4, 7, 0).unwrap();
    let drawn: Vec<u32> = (0..15).flat_map(|_| walk.next().to_vec()).collect();
    for epoch in drawn.chunks(10) {
        let mut sorted = epoch.to_vec();
        sorted.sort();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
    assert_ne!(drawn[..10], drawn[10..20], "epochs differ");
    assert_eq!(walk.position, 60);
    for position in [0, 3, 10, 37] {
        let mut resumed = set.batches(4, 7, position).unwrap();
        assert_eq!(resumed.next(), &drawn[position as usize..][..4], "resumed at {position}");
    }
    let mut other = set.batches(4, 8, 0).unwrap();
    assert_ne!(other.next(), &drawn[..4], "another seed, another order");
    let mut out = vec![0; 2 * set.image_len()];
    set.gather(&[3, 9], &mut out);
    assert_eq!(out, [set.image(3), set.image(9)].concat());
}

#[test]
fn fingerprint_and_duplicates_see_every_pixel() {
    let mut set = data::open(&DataSpec { limit: Some(50), ..DataSpec::default() }).unwrap();
    let before = set.fingerprint();
    assert_eq!(set.duplicates(), 0);
    let first = set.image(0).to_vec();
    let len = set.image_len();
    set.pixels[49 * len..].copy_from_slice(&first);
    assert_eq!(set.duplicates(), 1);
    assert_ne!(set.fingerprint(), before);
    set.pixels[50 * len - 1] ^= 1;
    assert_eq!(set.duplicates(), 0);
}
