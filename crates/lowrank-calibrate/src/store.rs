//! Where moments lie until they are used: one file for the inputs and one for the outputs of each expert, of a cache.
//!
//! Moments are kept as f32, lower triangles only: 67 MB per expert of an 8x7B model, 17 GB in all. What is used was always
//! read back, so a run that finds them in the cache gives the same bytes as the run that put them there.

use crate::{CalibrateError, ExpertMoments};
use lowrank_cache::{Arrays, Entry, Numbers};
use ndarray::Array2;

/// Moments of a model on a text.
#[derive(Debug, Clone)]
pub struct Store {
    entry: Entry,
    hidden_size: usize,
}

/// What the norms of w1 and w3 are made of.
#[derive(Debug, Clone, PartialEq)]
pub struct InputMoments {
    /// See [`RowWeights::gate`](crate::moments::RowWeights::gate).
    pub gate_rows: Vec<f64>,
    /// See [`RowWeights::up`](crate::moments::RowWeights::up).
    pub up_rows: Vec<f64>,
    /// See [`ExpertMoments::inputs`].
    pub inputs: Array2<f64>,
}

impl Store {
    /// The place for moments of a model of this hidden size.
    pub fn new(entry: Entry, hidden_size: usize) -> Self {
        Self { entry, hidden_size }
    }

    fn name(kind: &str, layer: usize, expert: usize) -> String {
        format!("{kind}-{layer:03}-{expert:03}")
    }

    /// Whether an expert's moments are there.
    pub fn has(&self, layer: usize, expert: usize) -> bool {
        ["inputs", "outputs"].iter().all(|kind| self.entry.has(&Self::name(kind, layer, expert)))
    }

    /// Keeps an expert's moments.
    pub fn put(&self, layer: usize, expert: usize, moments: &ExpertMoments) -> Result<(), CalibrateError> {
        let note = moments.tokens.to_string();
        let mut inputs = Arrays { note: note.clone(), ..Arrays::default() };
        inputs.arrays.insert("gate_rows".into(), Numbers::F64(moments.rows.gate.clone()));
        inputs.arrays.insert("up_rows".into(), Numbers::F64(moments.rows.up.clone()));
        inputs.arrays.insert("moment".into(), Numbers::F32(packed(&moments.inputs)));
        self.entry.put(&Self::name("inputs", layer, expert), &inputs)?;
        let mut outputs = Arrays { note, ..Arrays::default() };
        outputs.arrays.insert("moment".into(), Numbers::F32(packed(&moments.outputs)));
        Ok(self.entry.put(&Self::name("outputs", layer, expert), &outputs)?)
    }

    fn get(&self, kind: &str, layer: usize, expert: usize) -> Result<Arrays, CalibrateError> {
        let found = self.entry.get(&Self::name(kind, layer, expert))?;
        found.ok_or(CalibrateError::Absent { layer, expert })
    }

    /// Visits of an expert.
    pub fn tokens(&self, layer: usize, expert: usize) -> Result<u64, CalibrateError> {
        let absent = || CalibrateError::Absent { layer, expert };
        let note = self.entry.note(&Self::name("outputs", layer, expert))?.ok_or_else(absent)?;
        note.parse().map_err(|_| absent())
    }

    /// For w1 and w3.
    pub fn inputs(&self, layer: usize, expert: usize) -> Result<InputMoments, CalibrateError> {
        let absent = || CalibrateError::Absent { layer, expert };
        let mut arrays = self.get("inputs", layer, expert)?;
        Ok(InputMoments {
            gate_rows: arrays.take_f64("gate_rows").ok_or_else(absent)?,
            up_rows: arrays.take_f64("up_rows").ok_or_else(absent)?,
            inputs: self.unpacked(&arrays.take_f32("moment").ok_or_else(absent)?).ok_or_else(absent)?,
        })
    }

    /// For w2.
    pub fn outputs(&self, layer: usize, expert: usize) -> Result<Array2<f64>, CalibrateError> {
        let absent = || CalibrateError::Absent { layer, expert };
        let mut arrays = self.get("outputs", layer, expert)?;
        self.unpacked(&arrays.take_f32("moment").ok_or_else(absent)?).ok_or_else(absent)
    }

    /// The lower triangle; zeros above.
    fn unpacked(&self, values: &[f32]) -> Option<Array2<f64>> {
        let size = self.hidden_size;
        if values.len() != size * (size + 1) / 2 {
            return None;
        }
        let mut moment = Array2::zeros((size, size));
        let mut values = values.iter();
        for i in 0..size {
            for (entry, &value) in moment.row_mut(i).iter_mut().take(i + 1).zip(&mut values) {
                *entry = f64::from(value);
            }
        }
        Some(moment)
    }
}

/// The lower triangle, row by row.
fn packed(moment: &Array2<f64>) -> Vec<f32> {
    moment
        .outer_iter()
        .enumerate()
        .flat_map(|(i, row)| row.into_iter().take(i + 1).map(|&v| v as f32))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RowWeights;
    use lowrank_cache::Cache;

    #[test]
    fn lower_triangles_come_back_rounded_to_f32() {
        let cache = Cache::temporary().unwrap();
        let store = Store::new(cache.entry(&serde_json::json!(1)), 3);
        let inputs =
            Array2::from_shape_fn((3, 3), |(i, j)| if j <= i { 0.1 * (i * 3 + j) as f64 } else { 0.0 });
        let moments = ExpertMoments {
            tokens: 7,
            rows: RowWeights { gate: vec![0.1, 0.2], up: vec![0.3, 0.4] },
            outputs: inputs.mapv(|v| -v),
            inputs,
        };
        assert!(!store.has(2, 1));
        store.put(2, 1, &moments).unwrap();
        assert!(store.has(2, 1) && !store.has(1, 2));
        assert_eq!(store.tokens(2, 1).unwrap(), 7);
        let back = store.inputs(2, 1).unwrap();
        assert_eq!((back.gate_rows, back.up_rows), (vec![0.1, 0.2], vec![0.3, 0.4]));
        assert_eq!(back.inputs, moments.inputs.mapv(|v| f64::from(v as f32)));
        assert_eq!(store.outputs(2, 1).unwrap()[[2, 0]], f64::from(-0.6_f32));
        assert!(matches!(store.tokens(0, 0), Err(CalibrateError::Absent { layer: 0, expert: 0 })));
    }
}
