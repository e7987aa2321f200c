//! Experts, layers and windows that are measured apart from each other give the numbers of one process.

use lowrank_cache::{Arrays, Cache, Entry};
use lowrank_calibrate::{Apart, Norms, States, Store, WidthStore, collect, collect_experts, measure};
use lowrank_compute::Algebra;
use lowrank_forward::Forward;
use lowrank_model::plan::Structures;
use lowrank_model::progress::Silent;
use lowrank_model::recipe::CalibrationSettings;
use lowrank_model::{AlgebraChoice, MatrixId};
use lowrank_reader::Checkpoint;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

fn files(folder: &Path) -> BTreeMap<String, Arrays> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        for file in std::fs::read_dir(entry.path()).unwrap().map(Result::unwrap) {
            let name = file.file_name().into_string().unwrap();
            found.insert(name, Arrays::parse(&std::fs::read(file.path()).unwrap()).unwrap());
        }
    }
    found
}

#[test]
fn what_is_measured_apart_is_what_one_process_measures() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    for (model, shared_experts) in
        [("tiny-mixtral", false), ("golden/deepseek-v3", false), ("golden/qwen2-moe", true)]
    {
        let checkpoint = Checkpoint::open(&fixtures.join(model)).unwrap().with_shared_experts(shared_experts);
        let (forward, config) = (Forward::new(&checkpoint), checkpoint.config());
        let vocabulary = config.vocab_size as u32;
        // Windows of many lengths, so that the text is cut beside the tiles of every product.
        let windows: Vec<Vec<u32>> = [64, 17, 96, 1, 120, 33, 90]
            .into_iter()
            .enumerate()
            .map(|(w, tokens)| {
                (0..tokens).map(|t| (t * 7919 + w as u32 * 131 + t * t) % vocabulary).collect()
            })
            .collect();
        let algebra = Algebra::open(AlgebraChoice::default()).unwrap();
        let settings = CalibrationSettings::default();
        let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let entries: [Entry; 3] = folders.each_ref().map(|folder| Cache::at(folder.path()).entry(&json!(1)));
        let stores = |entry: &Entry| {
            let widths = WidthStore {
                entry: entry.clone(),
                algebra: &algebra,
                structures: Structures::RankWidthBase,
                shrinkage: settings.shrinkage,
                sample: (0..60).chain(90..130).collect(),
            };
            (Store::new(entry.clone(), config.hidden_size), widths)
        };
        let never = || false;
        let (store, widths) = stores(&entries[0]);
        collect(&forward, &windows, settings.moments, &store, Some(&widths), &Silent, &never).unwrap();
        let tokens = windows.iter().map(Vec::len).sum();
        let norms = |store: Store| {
            Norms::new(store, config, settings.moments.calibration_target, settings.shrinkage, tokens)
                .unwrap()
        };
        // The tokens that are sampled above.
        let sample = [windows[0][..60].to_vec(), windows[2][9..49].to_vec()];
        let of_whole = norms(store);
        let expected =
            measure(&forward, &of_whole, &algebra, &sample, Some(&widths), &Silent, &never).unwrap();

        let (store, widths) = stores(&entries[1]);
        let states = States::new(entries[2].clone(), &windows, config.hidden_size);
        let with_experts: Vec<usize> =
            (0..config.num_hidden_layers).rev().filter(|&layer| config.experts_in(layer) > 0).collect();
        let first = with_experts[0];
        assert!(states.of_layer(first).unwrap_err().to_string().contains("part 0"));
        for part in (0..states.parts()).rev() {
            // Stopped before the last layer with experts, it goes on behind the one before.
            let asked = std::cell::Cell::new(0);
            let stop = || asked.replace(asked.get() + 1) == first;
            states.run(&forward, &[part], &stop).unwrap_err();
            assert!(
                !states.has(first, part) && (with_experts.len() < 2 || states.has(with_experts[1], part))
            );
            states.run(&forward, &[part], &never).unwrap();
        }
        for layer in with_experts {
            let hidden = states.of_layer(layer).unwrap();
            let (some, others): (Vec<usize>, Vec<usize>) =
                config.compressed_experts(layer).partition(|expert| expert % 3 == 1);
            for experts in [some, others] {
                let place = (layer, experts.as_slice());
                collect_experts(&forward, &hidden, place, settings.moments, &store, Some(&widths), &never)
                    .unwrap();
            }
        }
        let norms = norms(store);
        let pieces = Cache::at(folders[2].path()).entry(&json!(2));
        let states = States::new(pieces.clone(), &sample, config.hidden_size);
        let apart = Apart {
            forward: &forward,
            norms: &norms,
            algebra: &algebra,
            sample: &states,
            widths: Some(&widths),
            entry: &pieces,
            stop: &never,
        };
        // One alone and the others together, as tasks share them out.
        let (first, others): (Vec<usize>, Vec<usize>) = (0..states.parts()).partition(|&part| part == 1);
        states.run(&forward, &first, &never).unwrap();
        states.run(&forward, &others, &never).unwrap();
        (0..config.num_hidden_layers).rev().for_each(|layer| apart.layer(layer).unwrap());
        assert!(apart.together().unwrap_err().to_string().contains("divergences-000"));
        (0..states.parts()).rev().for_each(|part| apart.part(part).unwrap());
        let found = apart.together().unwrap();
        let differing = expected.spectra.iter().filter(|(id, own)| found.spectra[id] != **own);
        assert_eq!(differing.map(|(id, _)| id).collect::<Vec<_>>(), Vec::<&MatrixId>::new(), "{model}");
        assert_eq!(found.layers, expected.layers, "{model}");

        let [whole, apart] = [0, 1].map(|at| files(folders[at].path()));
        assert_eq!(whole.keys().collect::<Vec<_>>(), apart.keys().collect::<Vec<_>>());
        for (name, numbers) in &whole {
            assert!(*numbers == apart[name], "{model}: {name}");
        }
    }
}
