//! The second moments of a shared expert that is compressed, held against plain sums in f64 over all tokens.

use lowrank_cache::Cache;
use lowrank_calibrate::{Store, collect};
use lowrank_forward::Forward;
use lowrank_model::names::Role;
use lowrank_model::progress::Silent;
use lowrank_model::recipe::CalibrationSettings;
use lowrank_model::{Projection, SHARED_EXPERT};
use lowrank_reader::Checkpoint;
use serde_json::json;
use std::path::Path;

/// W x in f64, W [m, n] row by row.
fn times(w: &[f32], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
}

#[test]
fn moments_of_a_shared_expert_are_sums_over_all_tokens_with_the_weights_of_its_gate() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    // With a gate and without one, wider than routed experts.
    for (family, layer) in [("qwen2-moe", 0), ("deepseek-v2", 1)] {
        let open = || Checkpoint::open(&fixtures.join(family)).unwrap();
        let (kept, checkpoint) = (open(), open().with_shared_experts(true));
        let windows: Vec<Vec<u32>> =
            [40, 23].map(|tokens| (0..tokens).map(|t| (t * 7919 + t * t) % 1000).collect()).to_vec();
        let (forward, config) = (Forward::new(&checkpoint), checkpoint.config());
        let (h, folder) = (config.hidden_size, tempfile::tempdir().unwrap());
        let store = Store::new(Cache::at(folder.path()).entry(&json!(1)), h);
        let settings = CalibrationSettings::default().moments;
        collect(&forward, &windows, settings, &store, None, &Silent, &|| false).unwrap();

        // Up to that layer the states are those of the model whose shared experts are kept.
        let mut hidden = Forward::new(&kept).embed(&windows).unwrap();
        for before in 0..layer {
            Forward::new(&kept).layer(before, &mut hidden, &mut ()).unwrap();
        }
        forward.attention(layer, &mut hidden).unwrap();
        let input = forward.moe_input(layer, &hidden).unwrap();
        let read = |role| kept.read_tensor(&kept.config().tensor(role)).unwrap().to_f32();
        let [gate, down, up] =
            Projection::ALL.map(|projection| read(Role::SharedExpert { layer, projection }));
        let has_gate = config.block.shared_experts.has_gate();
        let router = has_gate.then(|| read(Role::SharedExpertGate { layer }));

        let (mut outputs, mut rows) = (vec![0.0_f64; h * h], vec![0.0_f64; up.len() / h]);
        let energies: Vec<f64> = (0..rows.len())
            .map(|column| (0..h).map(|row| f64::from(down[row * rows.len() + column]).powi(2)).sum())
            .collect();
        for x in input.chunks_exact(h) {
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let (a, b) = (times(&gate, &x), times(&up, &x));
            let silu: Vec<f64> = a.iter().map(|a| a / (1.0 + (-a).exp())).collect();
            let z: Vec<f64> = silu.iter().zip(&b).map(|(silu, b)| silu * b).collect();
            let g = router.as_ref().map_or(1.0, |router| 1.0 / (1.0 + (-times(router, &x)[0]).exp()));
            let y: Vec<f64> = times(&down, &z).into_iter().map(|y| g * y).collect();
            for (at, sum) in outputs.iter_mut().enumerate() {
                *sum += y[at / h] * y[at % h];
            }
            for (row, (silu, energy)) in rows.iter_mut().zip(silu.iter().zip(&energies)) {
                *row += (g * silu).powi(2) * energy;
            }
        }
        assert_eq!(store.tokens(layer, SHARED_EXPERT).unwrap(), (input.len() / h) as u64);
        let (found, largest) = (store.outputs(layer, SHARED_EXPERT).unwrap(), outputs[0].abs().max(1e-12));
        for ((i, j), found) in found.indexed_iter().filter(|((i, j), _)| j <= i) {
            assert!(
                (found - outputs[i * h + j]).abs() < 1e-4 * largest.max(outputs[i * h + i]),
                "{family} {i} {j}"
            );
        }
        let inputs = store.inputs(layer, SHARED_EXPERT).unwrap();
        assert_eq!((inputs.up_rows.len(), inputs.gate_rows.len()), (rows.len(), rows.len()));
        for (found, row) in inputs.up_rows.iter().zip(&rows) {
            assert!((found - row).abs() < 1e-4 * row.abs().max(1e-9), "{family} {found} {row}");
        }
    }
}
