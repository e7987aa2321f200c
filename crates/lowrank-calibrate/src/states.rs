//! Hidden states of a text before every MoE block, kept by parts of the text: with them the experts of every layer can be
//! measured apart from each other, by several processes that share a cache.
//!
//! A part is some of the windows, and runs through the model alone. A token's states depend on its window alone, and their
//! bits do not depend on the tokens that are computed beside them, so they are those of a run of the whole text.

use crate::CalibrateError;
use lowrank_cache::{Arrays, Entry, Numbers};
use lowrank_forward::{Forward, Hidden};
use std::ops::Range;

/// Parts that a text has at most.
const PARTS: usize = 64;

/// Parts of so many windows: as many however many processes work on them.
pub fn parts_of(windows: usize) -> usize {
    windows.min(PARTS)
}

/// The array of a file.
const STATES: &str = "states";

/// Where the states of a text lie.
#[derive(Debug, Clone)]
pub struct States<'a> {
    entry: Entry,
    windows: &'a [Vec<u32>],
    hidden_size: usize,
}

impl<'a> States<'a> {
    /// The place for the states of these windows in a model of this hidden size.
    pub fn new(entry: Entry, windows: &'a [Vec<u32>], hidden_size: usize) -> Self {
        Self { entry, windows, hidden_size }
    }

    /// Parts of the text.
    pub fn parts(&self) -> usize {
        parts_of(self.windows.len())
    }

    /// Which windows a part has.
    fn range(&self, part: usize) -> Range<usize> {
        let start = |part| self.windows.len() * part / self.parts();
        start(part)..start(part + 1)
    }

    /// The windows of a part.
    pub fn windows_of(&self, part: usize) -> &'a [Vec<u32>] {
        &self.windows[self.range(part)]
    }

    /// N, tokens of all windows.
    pub(crate) fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// Which tokens of all a part has.
    pub(crate) fn rows_of(&self, part: usize) -> Range<usize> {
        let before = |window: usize| self.windows[..window].iter().map(Vec::len).sum();
        let Range { start, end } = self.range(part);
        before(start)..before(end)
    }

    fn name(layer: usize, part: usize) -> String {
        format!("states-{layer:03}-{part:03}")
    }

    /// Runs parts through the model, unless their states are there. Together, so that every weight is read once for all of them;
    /// goes on behind the last layer whose states are there.
    pub fn run(
        &self,
        forward: &Forward<'_>,
        parts: &[usize],
        stop: &dyn Fn() -> bool,
    ) -> Result<(), CalibrateError> {
        let config = forward.config();
        let with_experts = |&layer: &usize| config.experts_in(layer) > 0;
        let layers: Vec<usize> = (0..config.num_hidden_layers).filter(with_experts).collect();
        let has_all = |part: usize| layers.iter().all(|&layer| self.has(layer, part));
        let open: Vec<usize> = parts.iter().copied().filter(|&part| !has_all(part)).collect();
        let (Some(&last), false) = (layers.last(), open.is_empty()) else { return Ok(()) };
        let done = layers.iter().take_while(|&&layer| open.iter().all(|&part| self.has(layer, part))).last();
        let mut hidden = match done {
            Some(&layer) => {
                let mut hidden = self.of_parts(layer, &open)?;
                through_experts(forward, layer, &mut hidden)?;
                hidden
            }
            None => {
                let windows: Vec<Vec<u32>> =
                    open.iter().flat_map(|&part| self.windows_of(part)).cloned().collect();
                forward.embed(&windows)?
            }
        };
        for layer in done.map_or(0, |layer| layer + 1)..=last {
            if stop() {
                return Err(CalibrateError::Stopped);
            }
            forward.attention(layer, &mut hidden)?;
            if with_experts(&layer) {
                self.put(layer, &open, &hidden)?;
            }
            if layer < last {
                through_experts(forward, layer, &mut hidden)?;
            }
        }
        Ok(())
    }

    /// Puts the states of parts before a layer's MoE block, which were run together.
    pub fn put(&self, layer: usize, parts: &[usize], hidden: &Hidden) -> Result<(), CalibrateError> {
        let mut rest = hidden.states();
        for &part in parts {
            let (own, after) = rest.split_at(self.rows_of(part).len() * self.hidden_size);
            rest = after;
            let mut arrays = Arrays::default();
            arrays.arrays.insert(STATES.into(), Numbers::F32(own.to_vec()));
            self.entry.put(&Self::name(layer, part), &arrays)?;
        }
        Ok(())
    }

    /// Whether the states of a part before a layer's MoE block are there.
    pub fn has(&self, layer: usize, part: usize) -> bool {
        self.entry.has(&Self::name(layer, part))
    }

    /// The states of a part before a layer's MoE block.
    ///
    /// # Errors
    /// They are not there.
    fn of_part(&self, layer: usize, part: usize) -> Result<Hidden, CalibrateError> {
        let absent = || CalibrateError::NoStates { layer, part };
        let mut arrays = self.entry.get(&Self::name(layer, part))?.ok_or_else(absent)?;
        let own = arrays.take_f32(STATES).ok_or_else(absent)?;
        let lengths: Vec<usize> = self.windows_of(part).iter().map(Vec::len).collect();
        match own.len() == self.rows_of(part).len() * self.hidden_size {
            true => Ok(Hidden::new(own, &lengths, self.hidden_size)),
            false => Err(absent()),
        }
    }

    /// The states of parts before a layer's MoE block, one part after another.
    ///
    /// # Errors
    /// They are not all there.
    pub fn of_parts(&self, layer: usize, parts: &[usize]) -> Result<Hidden, CalibrateError> {
        let windows = parts.iter().flat_map(|&part| self.windows_of(part));
        let lengths: Vec<usize> = windows.map(Vec::len).collect();
        let mut states = Vec::with_capacity(lengths.iter().sum::<usize>() * self.hidden_size);
        for &part in parts {
            states.extend_from_slice(self.of_part(layer, part)?.states());
        }
        Ok(Hidden::new(states, &lengths, self.hidden_size))
    }

    /// The states [N, H] of all windows before a layer's MoE block.
    ///
    /// # Errors
    /// A part was not run.
    pub fn of_layer(&self, layer: usize) -> Result<Hidden, CalibrateError> {
        self.of_parts(layer, &(0..self.parts()).collect::<Vec<_>>())
    }
}

/// Adds what a layer's MoE block makes of the states before it.
fn through_experts(forward: &Forward<'_>, layer: usize, hidden: &mut Hidden) -> Result<(), CalibrateError> {
    let input = forward.moe_input(layer, hidden)?;
    let output = forward.moe(layer, &[&input], &mut ())?.remove(0);
    forward.add(hidden, &output);
    Ok(())
}
