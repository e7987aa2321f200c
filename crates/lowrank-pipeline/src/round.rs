//! Rounding f32 results to the dtype they are stored in, and refusing what does not fit.

use crate::PipelineError;
use lowrank_model::{Dtype, Tensor};

/// Rounds to nearest even; a value beyond the dtype's range is an error that names the tensor.
pub fn round(name: &str, shape: Vec<usize>, dtype: Dtype, values: &[f32]) -> Result<Tensor, PipelineError> {
    let tensor = Tensor::from_f32(shape, dtype, values).expect("the producer knows its own shape");
    match tensor.first_non_finite() {
        None => Ok(tensor),
        Some(_) => Err(PipelineError::Overflow { tensor: name.to_owned(), dtype }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_beyond_half_precision_names_its_tensor() {
        let error = round("a.u.weight", vec![2], Dtype::F16, &[1.0, 1e6]).unwrap_err();
        assert_eq!(error.to_string(), "a.u.weight: a value does not fit F16");
        assert!(round("a.u.weight", vec![2], Dtype::Bf16, &[1.0, 1e6]).is_ok());
    }
}
