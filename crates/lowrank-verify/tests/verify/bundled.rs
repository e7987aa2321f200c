//! The bundled model on the bundled passage, against tokenizers and transformers in Python
//! (`tests/golden/make_fixtures.py`).

use lowrank_model::progress::Silent;
use lowrank_model::recipe::Bos;
use lowrank_reader::Checkpoint;
use lowrank_text::TextError;
use lowrank_verify::{TextSource, Verdict, VerifyOptions, verify};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

#[test]
fn the_passage_has_the_tokens_and_the_perplexity_of_the_reference() {
    let bytes = std::fs::read(fixtures().join("golden/passage.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let ids = golden.tensor("ids").unwrap().data().as_chunks::<2>().0.iter();
    let ids: Vec<u32> = ids.map(|raw| u32::from(u16::from_le_bytes(*raw))).collect();
    let shape = golden.tensor("windows").unwrap().data().as_chunks::<8>().0.to_vec();
    let (windows, window) = (u64::from_le_bytes(shape[0]) as usize, u64::from_le_bytes(shape[1]) as usize);
    let perplexity = f64::from_le_bytes(golden.tensor("perplexity").unwrap().data().try_into().unwrap());

    let tiny = fixtures().join("tiny-mixtral");
    // The reference was measured without BOS.
    let request = VerifyOptions { bos: Bos::Never, ..VerifyOptions::default() };
    let all = lowrank_text::windows(Checkpoint::open(&tiny).unwrap().dir(), &request.text_request()).unwrap();
    assert_eq!(all.sequences.concat(), ids[..ids.len() / window * window]);
    assert!(all.info.bundled);

    let options = VerifyOptions { max_tokens: Some(windows * window), ..request };
    let report = verify(&tiny, &tiny, &options, &Silent).unwrap();
    assert_eq!(report.verdict, Verdict::Passed, "{report}");
    let outcome = report.outcome.unwrap();
    assert_eq!((outcome.text.sequences, outcome.text.tokens), (windows, windows * window));
    let got = outcome.logits.unwrap().perplexity_original;
    assert!((got / perplexity - 1.0).abs() < 1e-5, "{got} {perplexity}");
}

#[test]
fn every_kind_of_text_gives_the_same_tokens() {
    let tiny = Checkpoint::open(&fixtures().join("tiny-mixtral")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sentence = "Long ago, \"Jack\" — as he was called — wasn't 12 years old;\nnor tall.";
    let read = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let text = TextSource::File(path);
        let options = VerifyOptions { text, window: 8, bos: Bos::Never, ..VerifyOptions::default() };
        lowrank_text::windows(tiny.dir(), &options.text_request()).map(|windows| windows.sequences)
    };
    let txt = read("a.txt", sentence).unwrap();
    assert!(txt.len() > 2 && txt.iter().all(|window| window.len() == 8));
    let line = serde_json::json!({"text": sentence, "source": "by hand"}).to_string();
    assert_eq!(read("a.jsonl", &format!("{line}\n\n")).unwrap(), txt);
    assert_eq!(read("a.json", &serde_json::to_string(&txt.concat()).unwrap()).unwrap(), txt);
    assert_eq!(read("b.json", &serde_json::to_string(&txt).unwrap()).unwrap(), txt);
    let words: Vec<String> = txt.concat().iter().map(u32::to_string).collect();
    assert_eq!(read("a.ids", &words.join("\n ")).unwrap(), txt);
    // A text shorter than a window is one window; one token predicts nothing.
    assert_eq!(read("short.ids", "5 6 7").unwrap(), [[5, 6, 7]]);
    assert!(matches!(read("one.ids", "5"), Err(TextError::TooShort { tokens: 1 })));
    assert!(matches!(read("bad.ids", "5 x"), Err(TextError::Content { .. })));
    assert!(matches!(read("bad.jsonl", "{\"body\": 1}"), Err(TextError::Content { .. })));
    assert!(matches!(read("a.pdf", "5"), Err(TextError::Kind { .. })));
}

#[test]
fn a_window_starts_with_the_tokenizers_bos_unless_it_is_not_to() {
    let tiny = Checkpoint::open(&fixtures().join("tiny-mixtral")).unwrap();
    let read = |bos| {
        let options = VerifyOptions { bos, window: 8, max_tokens: Some(64), ..VerifyOptions::default() };
        lowrank_text::windows(tiny.dir(), &options.text_request()).unwrap()
    };
    let (with, without) = (read(Bos::Auto), read(Bos::Never));
    assert!((with.info.prefix.as_slice(), without.info.prefix.as_slice()) == (&[1], &[]));
    assert!(with.sequences.iter().all(|window| window.len() == 8 && window[0] == 1));
    let text: Vec<u32> = with.sequences.iter().flat_map(|window| &window[1..]).copied().collect();
    assert_eq!(text, without.sequences.concat()[..text.len()]);
}
