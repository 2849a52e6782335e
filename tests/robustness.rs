use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is the library of the fuzz targets")]
mod readers;

use readers::{READERS, Reader};

/// The system's allocator, which also counts what the thread holds, so that a reader cannot take memory by a number in a file.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

#[expect(unsafe_code, reason = "an allocator is unsafe to write; this one hands all to the system's")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// The result of a call, and the most bytes that its thread held beyond before. libtorch's own bytes are not counted,
/// nor those of the thread that renders a chat template.
fn peak<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let given = call();
    (given, (PEAK.get() - before) as usize)
}

/// The most that a reader may hold: the parts of a JSON value, a tokenizer or a template take some hundred times its
/// text.
fn allowed(name: &str, length: usize) -> usize {
    // The protocol's sentences, an experiment's arms and the embedded tokenizer are there whatever the file says.
    let always = if ["experiment", "chat_template"].contains(&name) { 32 << 20 } else { 1 << 20 };
    always + 256 * length
}

/// Reads, and says whether the bytes were accepted; panics where the reader does or where it takes too much memory.
fn read(name: &str, reader: Reader, bytes: &[u8]) -> bool {
    let (accepted, held) = peak(|| reader(bytes));
    let most = allowed(name, bytes.len());
    assert!(held <= most, "{name} held {held} bytes for {} bytes, allowed are {most}", bytes.len());
    accepted
}

fn reader(name: &str) -> Reader {
    READERS.iter().find(|(known, _)| *known == name).unwrap().1
}

/// The saved inputs of a target, by file name.
fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn every_seed_is_accepted_and_every_saved_input_is_read_in_bounds() {
    for (name, reader) in READERS {
        let files = corpus(name);
        for (path, bytes) in &files {
            let accepted = read(name, reader, bytes);
            let is_seed = path.file_name().unwrap().to_str().unwrap().starts_with("seed-");
            assert!(accepted || !is_seed, "{} is not accepted", path.display());
            assert!(bytes.len() < 20_000, "{} is too large for a saved input", path.display());
        }
        assert!(
            files.iter().any(|(path, _)| path.file_name().unwrap().to_str().unwrap().starts_with("seed-")),
            "{name}"
        );
    }
}

/// Bytes changed in one of the ways in which files are broken or forged.
fn mutate(bytes: &mut Vec<u8>, others: &[(PathBuf, Vec<u8>)], rng: &mut ChaCha8Rng) {
    if bytes.is_empty() {
        return bytes.push(rng.random());
    }
    let at = rng.random_range(0..bytes.len());
    let length = rng.random_range(1..=8.min(bytes.len() - at));
    match rng.random_range(0..8) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes[at] = rng.random(),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..at + length)),
        4 => {
            // another file's middle
            let (_, other) = &others[rng.random_range(0..others.len())];
            let from = rng.random_range(0..other.len().max(1));
            let part = &other[from.min(other.len())..other.len().min(from + rng.random_range(1..200))];
            bytes.splice(at..at, part.iter().copied());
        }
        5 => {
            // a number as text, where there is one
            let digits =
                |bytes: &[u8], from: usize| bytes[from..].iter().position(u8::is_ascii_digit).map(|n| from + n);
            if let Some(start) = digits(bytes, at).or_else(|| digits(bytes, 0)) {
                let end =
                    bytes[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |n| start + n);
                let numbers = ["0", "-1", "1e999", "0.5", "4294967296", "9223372036854775807", "18446744073709551616"];
                bytes.splice(start..end, numbers[rng.random_range(0..numbers.len())].bytes());
            }
        }
        6 => {
            // a number as eight bytes
            let numbers = [0, 1, u64::from(u32::MAX), i64::MAX as u64, u64::MAX, bytes.len() as u64, 1 << 40];
            let number = numbers[rng.random_range(0..numbers.len())].to_le_bytes();
            bytes[at..at + length].copy_from_slice(&number[..length]);
        }
        _ => {
            // something again and again, as deep nesting is made
            let part = bytes[at..at + length].to_vec();
            bytes.splice(at..at, part.repeat(rng.random_range(1..100)));
        }
    }
}

/// The brief run of each target: the saved corpus under a fixed stream of mutations. (libFuzzer itself
/// keeps none of the saved inputs to mutate where the binary is not instrumented for coverage, and instrumenting it would compile
/// the workspace a second time.)
#[test]
fn mutated_saved_inputs_never_panic_and_take_bounded_memory() {
    for (index, (name, reader)) in READERS.into_iter().enumerate() {
        let corpus = corpus(name);
        let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
        let mut accepted = 0;
        for _ in 0..RUNS {
            let mut bytes = corpus[rng.random_range(0..corpus.len())].1.clone();
            for _ in 0..rng.random_range(1..=2) {
                mutate(&mut bytes, &corpus, &mut rng);
            }
            accepted += usize::from(read(name, reader, &bytes));
        }
        // Were all refused, the mutations would never come past the first check.
        assert!((1..RUNS).contains(&accepted), "{name}: {accepted} of {RUNS} are accepted");
    }
}

const RUNS: usize = 1000;

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_at_all_are_read_in_bounds(bytes in prop::collection::vec(any::<u8>(), 0..300), which in 0_usize..8) {
        let (name, reader) = READERS[which];
        read(name, reader, &bytes);
    }

    #[test]
    fn a_cut_file_is_refused(share in 0.0..1.0_f64) {
        for name in ["safetensors", "gguf", "config", "adapter_config", "tokenizer"] {
            for (path, bytes) in corpus(name) {
                if path.file_name().unwrap().to_str().unwrap().starts_with("seed-") {
                    let cut = (bytes.trim_ascii_end().len() as f64 * share) as usize;
                    prop_assert!(!read(name, reader(name), &bytes[..cut]), "{} cut at {cut}", path.display());
                }
            }
        }
    }
}

#[test]
fn nesting_as_deep_as_the_file_is_long_is_refused() {
    for n in [200, 100_000] {
        let (open, close) = ("[".repeat(n), "]".repeat(n));
        let json = format!("{{\"a\": {open}{close}}}");
        let toml = format!("a = {open}{close}");
        let dotted = format!("[[arms]]\nname = \"a\"\nset = [\"{}=1\"]\n", vec!["a"; n].join("."));
        let demo =
            fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments/tiny-random.toml")).unwrap();
        let header = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
        assert!(!read("safetensors", reader("safetensors"), &header));
        for name in ["safetensors", "config", "adapter_config", "tokenizer", "dataset", "experiment"] {
            assert!(!read(name, reader(name), json.as_bytes()), "{name}");
        }
        for text in [toml, format!("{}1", "a.".repeat(n)), format!("{demo}\n{dotted}")] {
            assert!(!read("experiment", reader("experiment"), text.as_bytes()));
        }
        for (open, close) in [("(", ")"), ("[", "]"), ("not ", "x"), ("{% if 1 %}", "{% endif %}"), ("{{ 1 ", "")] {
            let template = format!("{{{{ {}1{} }}}}", open.repeat(n), close.repeat(n));
            assert!(!read("chat_template", reader("chat_template"), template.as_bytes()), "{open}");
        }
    }
}

#[test]
fn a_number_in_a_file_allocates_nothing() {
    let huge = "9223372036854775807";
    let demo = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments/tiny-random.toml")).unwrap();
    let config = String::from_utf8(corpus("config")[0].1.clone()).unwrap();
    let adapter = String::from_utf8(corpus("adapter_config")[0].1.clone()).unwrap();
    let header = format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":[{huge},{huge}],\"data_offsets\":[0,{huge}]}}}}");
    let header = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let gguf = |at: usize| {
        let mut bytes = corpus("gguf")[0].1.clone();
        bytes[at..at + 8].fill(0x7f);
        bytes
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("safetensors", header),
        ("safetensors", [0xff; 64].to_vec()),
        ("gguf", gguf(8)),
        ("gguf", gguf(16)),
        ("gguf", gguf(24)),
        ("config", config.replace("\"num_hidden_layers\": 2", &format!("\"num_hidden_layers\": {huge}")).into()),
        ("config", config.replace("\"vocab_size\": ", &format!("\"vocab_size\": {huge}")).into()),
        ("adapter_config", adapter.replace("\"r\": ", &format!("\"r\": -{huge}")).into()),
        ("experiment", format!("{demo}\n[[arms]]\nname = \"a\"\nseeds = {huge}\n").into()),
        ("experiment", r#"{"number_prompts": {"n_numbers": [1, 4294967295]}}"#.into()),
        ("chat_template", format!("{{{{ ' ' * {huge} }}}}").into()),
        ("chat_template", format!("{{{{ 'a'|indent({huge}, true) }}}}").into()),
    ];
    for (name, bytes) in cases {
        assert!(
            !read(name, reader(name), &bytes),
            "{name}: {}",
            String::from_utf8_lossy(&bytes[..bytes.len().min(400)])
        );
    }
}

#[test]
fn the_allocation_guard_guards() {
    let (_, held) = peak(|| vec![0_u8; 5 << 20]);
    assert!(held >= 5 << 20);
    let greedy: Reader = |bytes| Vec::<u8>::with_capacity(bytes.len() << 20).is_empty();
    assert!(std::panic::catch_unwind(|| read("config", greedy, &[0; 16])).is_err());
    let ((), held) = peak(|| drop(vec![0_u8; 1000]));
    assert!((1000..2000).contains(&held));
}
