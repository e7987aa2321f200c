//! Every expert matrix of the bundled, trained model, against singular values from a direct SVD in f64 that shares
//! nothing with the Gram route; with the feature `lapack`, against LAPACK's as well.

use lowrank_compute::{Backend, Faer, Kernels};
use lowrank_model::{Dtype, MatrixId, Spectrum, Tensor};
use lowrank_svd::{SvdOptions, factor, residual::residual_energy, spectrum};
use ndarray::Array2;
use safetensors::SafeTensors;
use std::path::Path;

fn expert_matrices() -> Vec<(MatrixId, Tensor)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
    let mut found = Vec::new();
    for shard in 1..=4 {
        let bytes = std::fs::read(dir.join(lowrank_model::format::shard_name(shard, 4))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in tensors.iter() {
            if let Some(id) = name.strip_suffix(".weight").and_then(MatrixId::parse) {
                let dtype = Dtype::parse(&format!("{:?}", view.dtype())).unwrap();
                found.push((id, Tensor::new(view.shape().to_vec(), dtype, view.data().to_vec()).unwrap()));
            }
        }
    }
    found.sort_by_key(|(id, _)| *id);
    assert_eq!(found.len(), 4 * 8 * 3);
    found
}

fn direct_svd(backend: &dyn Backend, w: &Tensor) -> Spectrum {
    let wide = Array2::from_shape_vec((w.shape()[0], w.shape()[1]), w.to_f32()).unwrap().mapv(f64::from);
    let kernels: &dyn Kernels<f64> = backend;
    Spectrum::new(kernels.singular_values(wide).unwrap()).unwrap()
}

fn factors_reach_the_optimum(backend: &dyn Backend, reference: &dyn Backend) {
    let mut worst_excess = 0.0_f64;
    for (id, w) in expert_matrices() {
        let expected = direct_svd(reference, &w);
        let (known, _) = spectrum(backend, &w, &SvdOptions::default()).unwrap();
        for (value, expected) in known.sigma().iter().zip(expected.sigma()) {
            assert!((value - expected).abs() <= 1e-9 * expected, "{id}: σ {value} for {expected}");
        }
        for rank in [1, 37, 77, 99, 127] {
            let options = SvdOptions { spectrum: Some(&known), ..SvdOptions::default() }.for_matrix(id);
            let factored = factor(backend, &w, rank, &options).unwrap();
            let optimum = expected.relative_error(rank);
            let actual = (residual_energy(reference, &w, &factored.factors) / expected.energy()).sqrt();
            worst_excess = worst_excess.max(actual / optimum - 1.0);
            assert!((actual / optimum - 1.0).abs() <= 1e-6, "{id} rank {rank}: {actual} for {optimum}");
            assert!(
                (factored.relative_error / optimum - 1.0).abs() <= 1e-6,
                "{id} rank {rank}: {factored:?}"
            );
        }
    }
    println!("largest excess over the Eckart-Young optimum: {worst_excess:e}");
}

#[test]
fn factors_of_the_bundled_model_reach_the_optimum() {
    factors_reach_the_optimum(&Faer, &Faer);
}

#[cfg(feature = "lapack")]
#[test]
fn both_backends_reach_the_optimum_that_the_other_computes() {
    factors_reach_the_optimum(&Faer, &lowrank_compute::Lapack);
    factors_reach_the_optimum(&lowrank_compute::Lapack, &Faer);
}
