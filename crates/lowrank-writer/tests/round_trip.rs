//! What is written is what an independent parser (the `safetensors` crate) reads, and nothing shows before the end.

use lowrank_model::{Dtype, Tensor, plan::Size};
use lowrank_writer::{
    CheckpointWriter, Content, Documents, JobKey, Leftover, OutputTensor, Published, ShardLayout, StagingDir,
    WriteError, manifest::Manifest,
};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

fn tensors() -> impl Strategy<Value = Vec<(String, Tensor)>> {
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let shape = prop::collection::vec(0_usize..6, 0..4);
    prop::collection::btree_map("[a-z\"\\\\é.]{1,12}", (dtype, shape, any::<u8>()), 1..12).prop_map(|map| {
        map.into_iter()
            .map(|(name, (dtype, shape, seed))| {
                let bytes = shape.iter().product::<usize>() * dtype.size_bytes() as usize;
                let content = (0..bytes).map(|at| seed.wrapping_add(at as u8)).collect();
                (name, Tensor::new(shape, dtype, content).unwrap())
            })
            .collect()
    })
}

fn layout(tensors: &[(String, Tensor)], shard_bytes_max: u64) -> ShardLayout {
    let outputs = tensors
        .iter()
        .map(|(name, tensor)| OutputTensor {
            name: name.clone(),
            dtype: tensor.dtype().into(),
            shape: tensor.shape().to_vec(),
        })
        .collect();
    ShardLayout::new(outputs, shard_bytes_max).unwrap()
}

fn write<'a>(
    out: &Path,
    layout: ShardLayout,
    tensors: impl Iterator<Item = &'a (String, Tensor)>,
) -> Result<Published, WriteError> {
    let writer = CheckpointWriter::create(out, layout)?;
    for (name, tensor) in tensors {
        writer.write(name, tensor)?;
    }
    assert!(!out.exists(), "something shows before the end");
    writer.finish(Documents::default().with_file("config.json", "{}\n")?)
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_tensor_is_read_back_bit_by_bit_and_order_does_not_matter(
        tensors in tensors(),
        shard_bytes_max in 1_u64..400,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&tensors, shard_bytes_max);
        let published = write(&dir.path().join("one"), layout.clone(), tensors.iter()).unwrap();
        write(&dir.path().join("two"), layout.clone(), tensors.iter().rev()).unwrap();
        let files = files(&published.path);
        prop_assert_eq!(&files, &self::files(&dir.path().join("two")));

        let params: usize = tensors.iter().map(|(_, tensor)| tensor.elements()).sum();
        prop_assert_eq!(published.params, params as u64);
        let bytes: usize = tensors.iter().map(|(_, tensor)| tensor.bytes().len()).sum();
        prop_assert_eq!(published.bytes, bytes as u64);
        prop_assert_eq!(layout.size(), Size { params: params as u64, bytes: bytes as u64 });

        let index: serde_json::Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        prop_assert_eq!(map.len(), tensors.len());
        for (name, tensor) in &tensors {
            let file = &files[map[name].as_str().unwrap()];
            let parsed = safetensors::SafeTensors::deserialize(file).unwrap();
            let view = parsed.tensor(name).unwrap();
            prop_assert_eq!(view.shape(), tensor.shape());
            prop_assert_eq!(format!("{:?}", view.dtype()), tensor.dtype().safetensors_name());
            prop_assert_eq!(view.data(), tensor.bytes());
            let (_, metadata) = safetensors::SafeTensors::read_metadata(file).unwrap();
            prop_assert_eq!(metadata.metadata().as_ref().unwrap()["format"].as_str(), "pt");
        }
        for shard in layout.shards() {
            prop_assert_eq!(shard.header.len() % 8, 0);
            prop_assert!(shard.data_bytes() <= shard_bytes_max || shard.tensors.len() == 1
                || shard.tensors.iter().filter(|placed| placed.end > placed.begin).count() == 1);
            for placed in &shard.tensors {
                prop_assert_eq!(placed.begin % placed.tensor.dtype.size_bytes(), 0);
            }
        }
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        prop_assert_eq!(left.len(), 2, "only the two outputs remain, not {:?}", left);
    }
}

fn two() -> Vec<(String, Tensor)> {
    let values = [1.0, -2.0, 0.5, 3.0, 0.0, 7.0];
    vec![
        ("a".into(), Tensor::from_f32(vec![2, 3], Dtype::Bf16, &values).unwrap()),
        ("b".into(), Tensor::from_f32(vec![3, 2], Dtype::F32, &values).unwrap()),
    ]
}

#[test]
fn threads_write_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<(String, Tensor)> = (0..40_u32)
        .map(|at| {
            let values: Vec<f32> = (0..1000).map(|i| (at * 1000 + i) as f32).collect();
            (format!("t{at}"), Tensor::from_f32(vec![1000], Dtype::F32, &values).unwrap())
        })
        .collect();
    let layout = layout(&tensors, 30_000);
    write(&dir.path().join("serial"), layout.clone(), tensors.iter()).unwrap();
    let writer = CheckpointWriter::create(&dir.path().join("parallel"), layout).unwrap();
    std::thread::scope(|scope| {
        for part in tensors.chunks(10) {
            let writer = &writer;
            scope.spawn(move || part.iter().for_each(|(name, tensor)| writer.write(name, tensor).unwrap()));
        }
    });
    writer.finish(Documents::default().with_file("config.json", "{}\n").unwrap()).unwrap();
    assert_eq!(files(&dir.path().join("serial")), files(&dir.path().join("parallel")));
    // Shards were hashed by the threads that completed them.
    let out = dir.path().join("parallel");
    let manifest = fs::read(out.join(lowrank_model::format::MANIFEST_FILE)).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    assert!(manifest.files.len() > 5);
    assert_eq!(manifest, Manifest::of(&out).unwrap());
}

#[test]
fn a_wrong_tensor_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = two();
    let writer = CheckpointWriter::create(&dir.path().join("out"), layout(&tensors, 1000)).unwrap();
    let b = &tensors[1].1;
    assert!(matches!(writer.write("a", b), Err(WriteError::Shape { name, .. }) if name == "a"));
    let narrow = Tensor::from_f32(vec![3, 2], Dtype::F16, &[0.0; 6]).unwrap();
    assert!(matches!(writer.write("b", &narrow), Err(WriteError::Dtype { name, .. }) if name == "b"));
    assert!(matches!(writer.write("c", b), Err(WriteError::UnknownTensor { name }) if name == "c"));
    writer.write("b", b).unwrap();
    assert!(matches!(writer.write("b", b), Err(WriteError::WrittenTwice { name }) if name == "b"));
}

#[test]
fn block_by_block_is_the_same_and_no_byte_more_or_less() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = two();
    let layout = layout(&tensors, 1000);
    write(&dir.path().join("whole"), layout.clone(), tensors.iter()).unwrap();
    let writer = CheckpointWriter::create(&dir.path().join("blocks"), layout.clone()).unwrap();
    for (name, tensor) in &tensors {
        let mut growing = writer.begin(name, tensor.dtype().into(), tensor.shape()).unwrap();
        for block in tensor.bytes().chunks(5) {
            growing.write(block).unwrap();
        }
        assert!(matches!(growing.write(&[0]), Err(WriteError::Length { name: of }) if of == *name));
        growing.finish().unwrap();
    }
    writer.finish(Documents::default().with_file("config.json", "{}\n").unwrap()).unwrap();
    assert_eq!(files(&dir.path().join("whole")), files(&dir.path().join("blocks")));

    let writer = CheckpointWriter::create(&dir.path().join("short"), layout).unwrap();
    let (name, tensor) = &tensors[0];
    let mut growing = writer.begin(name, tensor.dtype().into(), tensor.shape()).unwrap();
    growing.write(&tensor.bytes()[1..]).unwrap();
    assert!(matches!(growing.finish(), Err(WriteError::Length { .. })));
}

#[test]
fn an_unfinished_checkpoint_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let tensors = two();
    let result = write(&out, layout(&tensors, 1000), tensors.iter().take(1));
    let error = result.unwrap_err();
    assert_eq!(error.to_string(), "tensor `b`: was never written; missing in all: 1");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    drop(CheckpointWriter::create(&out, layout(&tensors, 1000)).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_unfinished_checkpoint_can_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut writer = CheckpointWriter::create(&out, layout(&two(), 1000)).unwrap();
    writer.keep();
    drop(writer);
    assert!(!out.exists());
    assert!(dir.path().join(".out.lowrank-partial/out/model-00001-of-00001.safetensors").exists());
}

#[test]
fn a_size_other_than_promised_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let tensors = two();
    let writer = CheckpointWriter::create(&out, layout(&tensors, 1000)).unwrap();
    tensors.iter().for_each(|(name, tensor)| writer.write(name, tensor).unwrap());
    let documents = Documents::default().promising(Size { params: 12, bytes: 37 });
    let error = writer.finish(documents).unwrap_err();
    assert!(matches!(error, WriteError::Promise { what: "bytes", promised: 37, found: 36 }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn finished_work_goes_where_another_run_would_fail_alike() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let tensors = two();
    let key = JobKey::of(&"a job");
    let staging = StagingDir::for_job(&out, Leftover::Resume, || Ok::<_, WriteError>(key.clone())).unwrap();
    staging.naming().job(&key).unwrap();
    let writer = CheckpointWriter::grow(staging, layout(&tensors, 1000)).unwrap();
    for (name, tensor) in &tensors {
        writer.write_unit(name, &[(name, Content::Weights(tensor))], String::new()).unwrap();
    }
    assert!(writer.resumable().is_some(), "a kill would leave it");
    let documents = Documents::default().promising(Size { params: 12, bytes: 37 });
    assert!(matches!(writer.finish(documents), Err(WriteError::Promise { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_header_that_changed_on_disk_is_not_published() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let tensors = two();
    let tamper: [fn(&fs::File); 4] = [
        |file| file.set_len(file.metadata().unwrap().len() - 1).unwrap(),
        |file| file.set_len(file.metadata().unwrap().len() + 1).unwrap(),
        |file| file.write_all_at(&u64::MAX.to_le_bytes(), 0).unwrap(),
        |file| file.write_all_at(b"#", 20).unwrap(),
    ];
    for (case, tamper) in tamper.into_iter().enumerate() {
        let writer = CheckpointWriter::create(&dir.path().join("out"), layout(&tensors, 1000)).unwrap();
        tensors.iter().for_each(|(name, tensor)| writer.write(name, tensor).unwrap());
        let shard = writer.staging().join("model-00001-of-00001.safetensors");
        tamper(&fs::OpenOptions::new().write(true).open(shard).unwrap());
        let result = writer.finish(Documents::default());
        assert!(matches!(result, Err(WriteError::ReadBack { .. })), "case {case}: {result:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "case {case}");
    }
}

#[test]
fn companions_are_copied_verbatim_with_folders_and_ordinary_modes() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    fs::create_dir_all(base.join("folder")).unwrap();
    fs::write(base.join("tokenizer.json"), b"{ \"odd\":  1}").unwrap();
    fs::set_permissions(base.join("tokenizer.json"), fs::Permissions::from_mode(0o400)).unwrap();
    fs::write(base.join("folder/x.txt"), b"x").unwrap();
    let out = dir.path().join("out");
    let tensors = two();
    let writer = CheckpointWriter::create(&out, layout(&tensors, 1000)).unwrap();
    tensors.iter().for_each(|(name, tensor)| writer.write(name, tensor).unwrap());
    let names = [PathBuf::from("tokenizer.json"), PathBuf::from("folder/x.txt")];
    let documents = Documents::default().with_companions(&base, &names).unwrap();
    let clash = documents.clone().with_file("tokenizer.json", "");
    assert!(matches!(clash, Err(WriteError::DuplicateFile { .. })));
    writer.finish(documents).unwrap();
    assert_eq!(fs::read(out.join("tokenizer.json")).unwrap(), b"{ \"odd\":  1}");
    assert_eq!(fs::read(out.join("folder/x.txt")).unwrap(), b"x");
    // Whatever the umask here gives to a new file is what every file has.
    fs::write(dir.path().join("probe"), "").unwrap();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for name in ["tokenizer.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"] {
        assert_eq!(mode(out.join(name)), mode(dir.path().join("probe")), "{name}");
    }
}
