//! Bases that the experts of a layer share: each must be the mean of the original's matrices.

use crate::error::VerifyError;
use crate::factors::smallest_normal;
use crate::record::Record;
use crate::report::{Finding, FindingKind};
use lowrank_model::names::Role;
use lowrank_model::{MatrixId, Projection, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;

/// Of arithmetic: a mean in f64 may come by way of f32 before it is rounded.
const SLACK: f64 = 1.01;

/// Which layers have one, by config and record; and every element of every base against the mean, up to one rounding.
pub(crate) fn base_differences(
    original: &Checkpoint,
    compressed: &Checkpoint,
    record: Option<&Record>,
) -> Result<Vec<Finding>, VerifyError> {
    let mut findings = Vec::new();
    let in_file: Vec<usize> = compressed.config().shared_bases.iter().copied().collect();
    if let Some(recorded) =
        record.map(|record| &record.shared_base_layers).filter(|recorded| **recorded != in_file)
    {
        let detail = format!("the report says layers {recorded:?}, the file has {in_file:?}");
        findings.push(Finding { kind: FindingKind::SharedBaseDiffers, name: None, detail });
    }
    for layer in in_file {
        for projection in Projection::ALL {
            let spec = compressed.config().tensor(Role::SharedBase { layer, projection });
            let base = compressed.read_tensor(&spec)?;
            let mean = mean(original, layer, projection)?;
            if let Some(detail) = difference(&base, &mean) {
                findings.push(Finding {
                    kind: FindingKind::SharedBaseDiffers,
                    name: Some(spec.name),
                    detail,
                });
            }
        }
    }
    Ok(findings)
}

/// Σ W / E over the experts of a layer.
fn mean(original: &Checkpoint, layer: usize, projection: Projection) -> Result<Vec<f64>, VerifyError> {
    let experts = original.config().experts_in(layer);
    let mut sum: Vec<f64> = Vec::new();
    for expert in 0..experts {
        let StoredMatrix::Dense(w) = original.read_matrix(MatrixId { layer, expert, projection })? else {
            unreachable!("an original that is compressed is refused")
        };
        sum.resize(w.elements(), 0.0);
        sum.iter_mut().zip(w.to_f32()).for_each(|(sum, value)| *sum += f64::from(value));
    }
    Ok(sum.into_iter().map(|sum| sum / experts as f64).collect())
}

/// Where a base is not the mean.
fn difference(base: &Tensor, mean: &[f64]) -> Option<String> {
    let (u, least) = (base.dtype().unit_roundoff(), smallest_normal(base.dtype()));
    let is_mean =
        |(&value, &mean): (&f32, &f64)| (f64::from(value) - mean).abs() <= SLACK * u * mean.abs().max(least);
    let values = base.to_f32();
    // A NaN is no mean either.
    let first = values.iter().zip(mean).position(|pair| !is_mean(pair))?;
    Some(format!(
        "element {first} is {}, the mean of the original's matrices is {}",
        values[first], mean[first]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    #[test]
    fn one_rounding_is_allowed_and_no_more() {
        let mean = [1.0 / 3.0, -1e-30, 0.0, 70.0];
        let rounded: Vec<f32> = mean.iter().map(|&mean| mean as f32).collect();
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let base = Tensor::from_f32(vec![2, 2], dtype, &rounded).unwrap();
            assert_eq!(difference(&base, &mean), None, "{dtype}");
            for (at, wrong) in [(0, 0.34), (2, 1e-3), (3, f32::NAN)] {
                let mut values = rounded.clone();
                values[at] = wrong;
                let base = Tensor::from_f32(vec![2, 2], dtype, &values).unwrap();
                let found = difference(&base, &mean).unwrap();
                assert!(found.starts_with(&format!("element {at} is")), "{dtype} {found}");
            }
        }
    }
}
