use std::fs;

use half::{bf16, f16};
use safetensors::tensor::TensorView;

use super::*;

fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> PathBuf {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    path.to_owned()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(&tensor.flatten(0, -1).to_kind(Kind::Float)).unwrap()
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

const SMALL: [f32; 6] = [1.0, -2.5, 0.0, 0.125, 65504.0, -0.5]; // exact in f16; the fifth is not in bf16

#[test]
fn each_stored_kind_comes_in_the_kind_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let halves = SMALL.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let brains = SMALL.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let path = write(
        &folder.path().join("model.safetensors"),
        &[
            ("a.weight", Dtype::F32, &[2, 3], f32s(&SMALL)),
            ("b.weight", Dtype::F16, &[6], halves),
            ("c.weight", Dtype::BF16, &[3, 2], brains),
        ],
    );
    let weights = Weights::safetensors(&[path]).unwrap();
    assert_eq!(weights.names(), ["a.weight", "b.weight", "c.weight"]);
    let rounded: Vec<f32> = SMALL.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
    assert!((rounded[4] - SMALL[4]).abs() > 1.0);

    let root = weights.root(Kind::Float, Device::Cpu);
    assert_eq!(values(&root.at("a").get("weight", &[2, 3]).unwrap()), SMALL);
    assert_eq!(values(&root.at("b").get("weight", &[6]).unwrap()), SMALL);
    assert_eq!(values(&root.at("c").get("weight", &[3, 2]).unwrap()), rounded);
    let root = weights.root(Kind::BFloat16, Device::Cpu);
    for (name, shape) in [("a.weight", &[2, 3][..]), ("c.weight", &[3, 2])] {
        let tensor = root.get(name, shape).unwrap();
        assert_eq!(
            (tensor.kind(), tensor.size().as_slice(), values(&tensor)),
            (Kind::BFloat16, shape, rounded.clone())
        );
    }
    assert!(weights.describe().starts_with("3 tensors, 1 bf16 + 1 f16 + 1 f32, 1 kB"), "{}", weights.describe());
}

#[test]
fn a_tensor_of_several_blocks_and_threads_is_the_plain_conversion() {
    let n = 2 * THREAD + 3 * BLOCK + 1024;
    let floats: Vec<f32> = (0..n).map(|i| (i as f32).sin() * 2_f32.powi((i % 61) as i32 - 30)).collect();
    let plain = Tensor::from_slice(&floats).to_kind(Kind::BFloat16);
    let stored: Vec<u8> = floats.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let block = |at: Range<usize>| {
        Ok(Tensor::f_from_data_size(&stored[2 * at.start..2 * at.end], &[at.len() as i64], Kind::BFloat16)?)
    };
    for threads in [1, 2, 3, 8] {
        let found = fill(&[(n / 1024) as i64, 1024], Kind::Float, Device::Cpu, threads, block).unwrap();
        assert!(found.view(-1).equal(&plain.to_kind(Kind::Float)), "{threads} threads");
    }
    for broken in [0, n - 1] {
        let block = |at: Range<usize>| {
            if at.contains(&broken) { Err(Error::Tokenizer { problem: "broken".to_owned() }) } else { block(at) }
        };
        let error = fill(&[n as i64], Kind::Float, Device::Cpu, 3, block);
        assert!(message(error).contains("broken"));
    }
}

#[test]
fn what_is_not_finite_is_refused_wherever_it_stands() {
    let n = 2 * THREAD + 3 * BLOCK + 10;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let bits = |number: f32, dtype| match dtype {
        Dtype::F32 => number.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(number).to_le_bytes().to_vec(),
        _ => bf16::from_f32(number).to_le_bytes().to_vec(),
    };
    let load = |kind: Kind| {
        let weights = Weights::safetensors(std::slice::from_ref(&path)).unwrap();
        weights
            .root(kind, Device::Cpu)
            .get("a.weight", &[n as i64])
            .map(|tensor| tensor.isfinite().all().int64_value(&[]))
    };
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let largest = match dtype {
            Dtype::F32 => f32::MAX,
            Dtype::F16 => f16::MAX.to_f32(),
            _ => bf16::MAX.to_f32(),
        };
        let numbers = |broken: &[(usize, f32)]| {
            let at = |at: usize| broken.iter().find(|(place, _)| *place == at).map(|(_, number)| *number);
            let number = |i: usize| bits(at(i).unwrap_or(if i.is_multiple_of(2) { largest } else { -1e-7 }), dtype);
            let bytes = (0..n).flat_map(number).collect();
            write(&path, &[("a.weight", dtype, &[n], bytes)]);
        };
        numbers(&[]);
        for kind in [Kind::Float, Kind::Double] {
            assert_eq!(load(kind).unwrap(), 1, "{dtype:?}: the largest numbers are numbers");
        }
        for (broken, expected) in [
            (vec![(0, f32::NAN)], 1),
            (vec![(n - 1, f32::INFINITY)], 1),
            (vec![(7, -f32::NAN), (BLOCK, f32::NEG_INFINITY), (THREAD + 1, f32::NAN), (n - 2, f32::INFINITY)], 4),
        ] {
            numbers(&broken);
            // A tensor in the stored dtype uses the file's pages; any other is converted.
            for kind in [Kind::Float, Kind::BFloat16] {
                let refused = message(load(kind));
                let expected =
                    format!("m.safetensors: tensor a.weight is NaN or infinite in {expected} of its {n} values");
                assert!(refused.contains(&expected), "{dtype:?} as {kind:?}: {refused}");
            }
        }
    }
}

#[test]
fn a_gguf_s_broken_scale_is_refused() {
    let mut bytes = crate::load::gguf::tests::tiny();
    let gguf = Gguf::parse(bytes.clone(), Path::new("m.gguf")).unwrap();
    let (name, info) = gguf.tensors().iter().find(|(_, info)| info.dtype.block_size() == 32).unwrap();
    let (name, shape, at) = (name.clone(), info.shape.clone(), info.bytes.start);
    let load = |bytes: &[u8]| {
        let weights = Weights::gguf(Gguf::parse(bytes.to_vec(), Path::new("m.gguf")).unwrap());
        weights.root(Kind::Float, Device::Cpu).get(&name, &shape)
    };
    assert!(load(&bytes).is_ok());
    bytes[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes()); // a block's scale
    let refused = message(load(&bytes));
    let numel: i64 = shape.iter().product();
    let expected = format!("m.gguf: tensor {name} is NaN or infinite in 32 of its {numel} values");
    assert!(refused.starts_with(&expected), "{refused}");
}

#[test]
fn a_tensor_on_the_file_s_pages_is_a_copy_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let tensors: &[(&str, Dtype, &[usize], _)] =
        &[("a", Dtype::F32, &[2, 3], f32s(&SMALL)), ("b", Dtype::F32, &[6], f32s(&SMALL))];
    write(&path, tensors);
    let before = fs::read(&path).unwrap();
    let weights = Weights::safetensors(std::slice::from_ref(&path)).unwrap();
    let Source::Safetensors { shards, .. } = &weights.source else { panic!("another source") };
    let info = shards[0].header.info("b").unwrap();
    let in_place = shards[0].in_place(info, Kind::Float, &[6]).unwrap();
    assert_eq!(values(&in_place), SMALL);

    // The tensors do not change when the file is replaced, and a write to one tensor changes no other tensor and no
    // file.
    fs::write(folder.path().join("other"), vec![0; before.len()]).unwrap();
    fs::rename(&path, folder.path().join("moved")).unwrap();
    fs::rename(folder.path().join("other"), &path).unwrap();
    let root = weights.root(Kind::Float, Device::Cpu);
    let mut first = root.get("b", &[6]).unwrap();
    let _ = first.fill_(7.0);
    assert_eq!(values(&first), [7.0; 6]);
    assert_eq!(values(&root.get("b", &[6]).unwrap()), SMALL);
    assert_eq!(values(&root.get("a", &[2, 3]).unwrap()), SMALL);
    assert_eq!(fs::read(folder.path().join("moved")).unwrap(), before);
    drop(weights);
    assert_eq!(values(&in_place), SMALL);
}

#[test]
fn the_cursor_spells_names_and_the_errors_say_them() {
    let folder = tempfile::tempdir().unwrap();
    let name = "model.layers.3.self_attn.q_proj.weight";
    let path = write(
        &folder.path().join("m.safetensors"),
        &[(name, Dtype::F32, &[2, 3], f32s(&SMALL)), ("steps", Dtype::I64, &[1], vec![0; 8])],
    );
    let weights = Weights::safetensors(&[path]).unwrap();
    let root = weights.root(Kind::Float, Device::Cpu);
    let q = root.at("model").at("layers").at(3).at("self_attn").at("q_proj");
    assert!(q.has("weight") && !q.has("bias") && q.get("weight", &[2, 3]).is_ok());
    assert_eq!(message(q.get("weight", &[3, 2])), format!("tensor {name} has shape [2, 3], expected [3, 2]"));
    let missing = message(q.get("bias", &[2]));
    assert!(
        missing.contains("model.layers.3.self_attn.q_proj.bias is missing in ") && missing.ends_with("m.safetensors"),
        "{missing}"
    );
    let wrong = message(root.get("steps", &[1]));
    assert!(wrong.contains("tensor steps is stored as I64, expected F32, F16 or BF16"), "{wrong}");
}

#[test]
fn shards_are_found_by_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("s-1.safetensors"), &[("a", Dtype::F32, &[1], f32s(&[1.0]))]);
    write(&at("s-2.safetensors"), &[("b", Dtype::F32, &[1], f32s(&[2.0]))]);
    let index = |map: &str| {
        fs::write(at("m.index.json"), format!(r#"{{"metadata": {{"total_size": 8}}, "weight_map": {map}}}"#)).unwrap();
        Weights::safetensors(&[at("m.index.json")])
    };
    let weights = index(r#"{"a": "s-1.safetensors", "b": "s-2.safetensors"}"#).unwrap();
    assert_eq!(values(&weights.root(Kind::Float, Device::Cpu).get("b", &[1]).unwrap()), [2.0]);
    assert_eq!(Weights::safetensors(&[at("s-1.safetensors"), at("s-2.safetensors")]).unwrap().names(), ["a", "b"]);

    assert!(message(index(r#"{"a": "s-2.safetensors", "b": "s-2.safetensors"}"#)).contains("tensor a is missing in"));
    assert!(message(index(r#"{"a": "s-3.safetensors"}"#)).contains("s-3.safetensors: No such file"));
    for outside in
        ["../s-1.safetensors", "/s-1.safetensors", "deep/s-1.safetensors", "..\\\\s-1.safetensors", "", "..", "s-1.bin"]
    {
        let refused = message(index(&format!(r#"{{"a": "{outside}"}}"#)));
        assert!(refused.contains("weight_map names \"") && refused.contains("beside it"), "{outside}: {refused}");
    }
    assert!(message(index("{}")).contains("weight_map is empty"));
    assert!(message(index("3")).contains("expected an index with a weight_map"));
    fs::copy(at("s-1.safetensors"), at("s-9.safetensors")).unwrap();
    assert!(
        message(Weights::safetensors(&[at("s-1.safetensors"), at("s-9.safetensors")])).contains("tensor a is also in")
    );
}

#[test]
fn a_damaged_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let whole =
        fs::read(write(&folder.path().join("m.safetensors"), &[("a", Dtype::F32, &[6], f32s(&SMALL))])).unwrap();
    let path = folder.path().join("cut.safetensors");
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let message = message(Weights::safetensors(std::slice::from_ref(&path)));
        assert!(message.contains("cut.safetensors: expected a safetensors file"), "{length}: {message}");
    }
    let mut huge = whole;
    huge[..8].fill(0xff);
    fs::write(&path, &huge).unwrap();
    assert!(Weights::safetensors(&[path]).is_err());
}

#[test]
fn what_a_header_cannot_mean_is_refused() {
    let of = |header: &str, data: usize| {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        Weights::parse(bytes, Path::new("m.safetensors")).map(|weights| weights.names().len())
    };
    let tensor = |name: &str, dtype: &str, shape: &str, from: usize, to: usize| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let (a, b) = (tensor("a", "F32", "[2]", 0, 8), tensor("b", "F32", "[1]", 8, 12));
    assert_eq!(of(&format!("{{{a},{b}}}"), 12).unwrap(), 2);
    for (header, data) in [
        (format!("{{{a},{}}}", tensor("b", "F32", "[2]", 0, 8)), 8), // overlapping
        (format!("{{{a},{}}}", tensor("b", "F32", "[1]", 12, 16)), 16), // a gap
        (format!("{{{a},{b}}}"), 11),
        (format!("{{{a},{b}}}"), 13),
        (format!("{{{}}}", tensor("a", "F32", "[3]", 0, 8)), 8),
        (format!("{{{}}}", tensor("a", "F32", "[-2]", 0, 8)), 8),
        (format!("{{{}}}", tensor("a", "PICKLE", "[2]", 0, 8)), 8),
        (format!("{{{}}}", tensor("a", "F32", "[4611686018427387904,4]", 0, 0)), 0),
    ] {
        assert!(message(of(&header, data)).starts_with("m.safetensors: expected a safetensors file: "), "{header}");
    }
    for shape in ["[0]", "[2,0]", "[0,9223372036854775807]"] {
        let refused = message(of(&format!("{{{}}}", tensor("a", "F32", shape, 0, 0)), 0));
        assert!(refused.contains("tensor a has the shape [") && refused.contains("at least 1"), "{refused}");
    }
}

#[test]
fn tensors_in_memory_are_copied_out() {
    let weights = Weights::from_tensors("test", BTreeMap::from([("a".to_owned(), Tensor::from_slice(&SMALL))]));
    let mut copy = weights.root(Kind::Float, Device::Cpu).get("a", &[6]).unwrap();
    let _ = copy.fill_(7.0);
    assert_eq!(values(&weights.root(Kind::Float, Device::Cpu).get("a", &[6]).unwrap()), SMALL);
    assert_eq!(message(weights.root(Kind::Float, Device::Cpu).get("b", &[6])), "tensor b is missing in test");
}
