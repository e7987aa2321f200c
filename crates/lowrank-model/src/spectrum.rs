//! Singular values, and with them the error of every rank.
//!
//! For W with singular values σ₁ ≥ σ₂ ≥ …, the best approximation of rank r misses W by
//! ‖W − Wᵣ‖²_F = Σ_{i>r} σᵢ² (Eckart and Young, 1936).

use serde::{Deserialize, Serialize};

/// Singular values of one matrix, largest first; as many as its short side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<f64>", into = "Vec<f64>")]
pub struct Spectrum {
    sigma: Vec<f64>,
}

/// A spectrum that cannot be one.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum SpectrumError {
    /// A value that no matrix has at this place.
    #[error("not a spectrum: value {index} is negative, not finite, or larger than the one before it")]
    Value {
        /// The first offender.
        index: usize,
    },
    /// Errors are sums of squares.
    #[error("the squares of the singular values have no finite sum")]
    Energy,
}

impl Spectrum {
    /// Takes singular values in falling order.
    pub fn new(sigma: Vec<f64>) -> Result<Self, SpectrumError> {
        let mut previous = f64::INFINITY;
        for (index, &value) in sigma.iter().enumerate() {
            if !value.is_finite() || value < 0.0 || value > previous {
                return Err(SpectrumError::Value { index });
            }
            previous = value;
        }
        let spectrum = Self { sigma };
        if spectrum.energy().is_finite() { Ok(spectrum) } else { Err(SpectrumError::Energy) }
    }

    /// σ, falling.
    pub fn sigma(&self) -> &[f64] {
        &self.sigma
    }

    /// ‖W‖²_F.
    pub fn energy(&self) -> f64 {
        self.tail_energies()[0]
    }

    /// Squared error of every rank: entry r is Σ_{i>r} σᵢ², so entry 0 is ‖W‖² and the last is 0.
    /// Summed from the smallest up, so that no tail is lost beside a large head.
    pub fn tail_energies(&self) -> Vec<f64> {
        let mut tails = vec![0.0; self.sigma.len() + 1];
        for r in (0..self.sigma.len()).rev() {
            tails[r] = tails[r + 1] + self.sigma[r] * self.sigma[r];
        }
        tails
    }

    /// ‖W − Wᵣ‖ / ‖W‖; 0 for a zero matrix.
    pub fn relative_error(&self, rank: usize) -> f64 {
        let tails = self.tail_energies();
        if tails[0] == 0.0 { 0.0 } else { (tails[rank.min(self.sigma.len())] / tails[0]).sqrt() }
    }
}

impl TryFrom<Vec<f64>> for Spectrum {
    type Error = SpectrumError;

    fn try_from(sigma: Vec<f64>) -> Result<Self, SpectrumError> {
        Self::new(sigma)
    }
}

impl From<Spectrum> for Vec<f64> {
    fn from(spectrum: Spectrum) -> Self {
        spectrum.sigma
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_sum_the_squares_beyond_a_rank() {
        let spectrum = Spectrum::new(vec![3.0, 2.0, 1.0]).unwrap();
        assert_eq!(spectrum.tail_energies(), vec![14.0, 5.0, 1.0, 0.0]);
        assert_eq!(spectrum.relative_error(1), (5.0_f64 / 14.0).sqrt());
    }

    #[test]
    fn what_is_no_spectrum_is_refused() {
        for sigma in [vec![1.0, 2.0], vec![f64::NAN], vec![-1.0], vec![f64::INFINITY], vec![1e200, 1.0]] {
            assert!(serde_json::from_value::<Spectrum>(serde_json::json!(sigma)).is_err());
            assert!(Spectrum::new(sigma).is_err());
        }
        assert_eq!(Spectrum::new(vec![0.0, 0.0]).unwrap().relative_error(0), 0.0);
    }
}
