//! What can be held against a checkpoint without running it.
//!
//! Every tensor is read from both sides once. Whatever is not a factored expert matrix must be the same bytes; a
//! factored one must have the rank and the error that its record says; counts in metadata must be those of the headers.

use crate::bases::base_differences;
use crate::error::VerifyError;
use crate::factors::{
    energy, largest_coefficient, relative_error, relative_error_of_narrowed, rounding_at_most,
    rounding_energy, smallest_normal,
};
use crate::record::{
    Record, RecordedMatrix, chance, read_index_totals, read_record, squared_error_tolerance,
};
use crate::report::{BudgetCheck, FactoredMatrix, Files, Finding, FindingKind};
use lowrank_model::names::Role;
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{
    Layout, MatrixId, MatrixShape, Progress, Projection, StoredMatrix, Tensor, Unit, failure, format,
};
use lowrank_reader::Checkpoint;
use lowrank_reader::companions::is_read_by_loaders;
use std::collections::{BTreeMap, BTreeSet};

/// Holds every claim against the bytes.
pub fn check(
    original: &Checkpoint,
    compressed: &Checkpoint,
    progress: &dyn Progress,
) -> Result<(Files, Vec<Finding>), VerifyError> {
    let mut claims = Claims { original, compressed, findings: Vec::new() };
    claims.extra_tensors();
    claims.copied_files();
    let record = claims.record();
    let budget = claims.counts(record.as_ref());
    claims.base_files(record.as_ref(), progress)?;
    let kept = claims.widths(record.as_ref());
    claims.findings.extend(base_differences(original, compressed, record.as_ref())?);
    let (untouched_tensors, factored, dense_matrices) = claims.tensors(record.as_ref(), &kept, progress)?;
    let files = Files {
        original: original.size(),
        compressed: compressed.size(),
        budget,
        untouched_tensors,
        factored,
        dense_matrices,
    };
    Ok((files, claims.findings))
}

/// Names what differs between the two models' dimensions and constants.
pub fn config_differences(original: &Checkpoint, compressed: &Checkpoint) -> Vec<Finding> {
    let (ours, theirs) = (original.config().constants(), compressed.config().constants());
    let differing = ours.into_iter().zip(theirs).filter(|(ours, theirs)| ours != theirs);
    differing
        .map(|((name, original), (_, compressed))| Finding {
            kind: FindingKind::ConfigDiffers,
            name: Some(name.to_owned()),
            detail: format!("{compressed}, in the original {original}"),
        })
        .collect()
}

struct Claims<'a> {
    original: &'a Checkpoint,
    compressed: &'a Checkpoint,
    findings: Vec<Finding>,
}

impl Claims<'_> {
    fn find(&mut self, kind: FindingKind, name: impl Into<Option<String>>, detail: String) {
        self.findings.push(Finding { kind, name: name.into(), detail });
    }

    fn extra_tensors(&mut self) {
        for extra in self.compressed.ignored() {
            let detail = format!("in {}: not a tensor of this model", extra.shard);
            self.find(FindingKind::ExtraTensor, extra.tensor.clone(), detail);
        }
    }

    fn copied_files(&mut self) {
        // What a loader reads decides what the model is given and what it says.
        let names = self.original.companions().iter().filter_map(|name| name.to_str());
        for name in names.filter(|name| is_read_by_loaders(name)) {
            let Ok(ours) = std::fs::read(self.original.dir().join(name)) else { continue };
            if std::fs::read(self.compressed.dir().join(name)).ok() != Some(ours) {
                let detail = "is absent or not a copy of the original's".to_owned();
                self.find(FindingKind::FileDiffers, name.to_owned(), detail);
            }
        }
    }

    /// Only our own format carries a record; there it must be.
    fn record(&mut self) -> Option<Record> {
        if self.compressed.layout() != Layout::LowRank && self.compressed.config().widths.is_empty() {
            return None;
        }
        match read_record(self.compressed.dir()) {
            Ok(record) => Some(record),
            Err(what) => {
                self.find(FindingKind::RecordUnusable, format::REPORT_FILE.to_owned(), what);
                None
            }
        }
    }

    /// Every count in the metadata against the headers.
    fn counts(&mut self, record: Option<&Record>) -> Option<BudgetCheck> {
        let (before, after) = (self.original.size(), self.compressed.size());
        let (index_bytes, index_params) = read_index_totals(self.compressed.dir());
        let mut counts = vec![
            ("total_size in the index", index_bytes, after.bytes),
            ("total_parameters in the index", index_params, after.params),
        ];
        if let Some(record) = record {
            counts.extend([
                ("before.params in the report", Some(record.before.params), before.params),
                ("before.bytes in the report", Some(record.before.bytes), before.bytes),
                ("after.params in the report", Some(record.after.params), after.params),
                ("after.bytes in the report", Some(record.after.bytes), after.bytes),
            ]);
        }
        let budget = record.and_then(|record| record.budget.as_ref());
        let check = budget.map(|budget| {
            let (before, after) = match budget.unit {
                Unit::Params => (before.params, after.params),
                Unit::Bytes => (before.bytes, after.bytes),
            };
            BudgetCheck { unit: budget.unit, asked: budget.asked, removed: before.saturating_sub(after) }
        });
        if let (Some(budget), Some(check)) = (budget, check) {
            counts.push(("budget.removed in the report", Some(budget.removed), check.removed));
        }
        for (what, claimed, counted) in counts {
            if let Some(claimed) = claimed.filter(|&claimed| claimed != counted) {
                let detail = format!("says {claimed}, the headers add up to {counted}");
                self.find(FindingKind::CountDiffers, what.to_owned(), detail);
            }
        }
        if let Some(check) = check.filter(|check| check.removed < check.asked) {
            let BudgetCheck { unit, asked, removed } = check;
            let detail = format!("{removed} {unit} were removed, {asked} were asked");
            self.find(FindingKind::BudgetMissed, None, detail);
        }
        check
    }

    /// The original at hand must be the one that was compressed: the hashes of its shards.
    fn base_files(&mut self, record: Option<&Record>, progress: &dyn Progress) -> Result<(), VerifyError> {
        let Some(record) = record else { return Ok(()) };
        let shards = self.original.shards();
        let recorded: BTreeMap<&str, &str> =
            record.base_model.files.iter().map(|file| (file.name.as_str(), file.sha256.as_str())).collect();
        progress.start("hashing the original", shards.iter().map(|shard| shard.len_bytes).sum(), "bytes");
        for shard in shards {
            match recorded.get(shard.name.as_str()) {
                Some(&recorded) => {
                    let hash = self.original.shard_sha256(&shard.name, &mut |bytes| {
                        progress.advance(bytes);
                        Ok::<_, VerifyError>(())
                    })?;
                    if hash != recorded {
                        let detail = format!("has SHA-256 {hash}; compressed was a file with {recorded}");
                        self.find(FindingKind::OtherOriginal, shard.name.clone(), detail);
                    }
                }
                None if recorded.is_empty() => {}
                None => {
                    let detail = "is not among the files that were compressed".to_owned();
                    self.find(FindingKind::OtherOriginal, shard.name.clone(), detail);
                }
            }
        }
        progress.finish();
        Ok(())
    }

    /// Every tensor of both sides. → untouched tensors, factored matrices, dense expert matrices.
    fn tensors(
        &mut self,
        record: Option<&Record>,
        kept: &BTreeMap<(usize, usize), Vec<usize>>,
        progress: &dyn Progress,
    ) -> Result<(usize, Vec<FactoredMatrix>, usize), VerifyError> {
        let (original, compressed) = (self.original, self.compressed);
        let rows: BTreeMap<&str, &RecordedMatrix> =
            record.iter().flat_map(|record| &record.matrices).map(|row| (row.name.as_str(), row)).collect();
        let (mut untouched, mut factored, mut dense) = (0, Vec::new(), 0);
        progress.start("comparing tensors", original.specs().len() as u64, "tensors");
        for spec in original.specs() {
            match spec.role {
                Role::Expert(id) => {
                    let row = rows.get(original.config().module_name(id).as_str()).copied();
                    if record.is_some() && row.is_none() {
                        let detail = "has no row in the report".to_owned();
                        self.find(FindingKind::RecordUnusable, original.config().module_name(id), detail);
                    }
                    self.rank(id, row);
                    let (ours, theirs) = (original.read_matrix(id)?, compressed.read_matrix(id)?);
                    let place = (id.layer, id.expert);
                    if compressed.config().widths.of(id.layer, id.expert).is_some() {
                        let Some(kept) = kept.get(&place) else { continue };
                        self.kept_rows(spec, id, &ours, &theirs, kept);
                        factored.push(self.factored(id, &ours, &theirs, Some(kept), row));
                        progress.advance(1);
                        continue;
                    }
                    match (&ours, &theirs) {
                        (StoredMatrix::Dense(ours), StoredMatrix::Dense(theirs)) => {
                            untouched += 1;
                            dense += 1;
                            self.same(&spec.name, ours, theirs);
                        }
                        _ => factored.push(self.factored(id, &ours, &theirs, None, row)),
                    }
                }
                _ => {
                    untouched += 1;
                    let (ours, theirs) = (original.read_tensor(spec)?, compressed.read_tensor(spec)?);
                    self.same(&spec.name, &ours, &theirs);
                }
            }
            progress.advance(1);
        }
        progress.finish();
        Ok((untouched, factored, dense))
    }

    /// The channels of narrowed experts, whose widths are held against the record. Without them nothing can be said of these
    /// experts' matrices.
    fn widths(&mut self, record: Option<&Record>) -> BTreeMap<(usize, usize), Vec<usize>> {
        let spelling = self.original.config().family.spelling();
        if let Some(record) = record {
            let ours: BTreeMap<(usize, usize), usize> = (self.compressed.config().widths.iter())
                .map(|(layer, expert, width)| ((layer, expert), width))
                .collect();
            let theirs: BTreeMap<(usize, usize), usize> =
                record.experts.iter().map(|row| ((row.layer, row.expert), row.width)).collect();
            for place in ours.keys().chain(theirs.keys()).collect::<BTreeSet<_>>() {
                let (in_file, recorded) = (ours.get(place), theirs.get(place));
                if in_file != recorded {
                    let word = |width: Option<&usize>| {
                        width.map_or("all channels".to_owned(), |width| format!("{width} channels"))
                    };
                    let (in_file, recorded) = (word(in_file), word(recorded));
                    let detail = format!("the report says {recorded}, the file has {in_file}");
                    self.find(FindingKind::WidthDiffers, spelling.expert(place.0, place.1), detail);
                }
            }
        }
        match self.compressed.kept_channels() {
            Ok(kept) => {
                kept.into_iter().map(|(place, channels)| (place, channels.iter().collect())).collect()
            }
            Err(error) => {
                let detail = failure::chain(&error);
                self.find(FindingKind::RecordUnusable, format::CHANNELS_FILE.to_owned(), detail);
                BTreeMap::new()
            }
        }
    }

    /// Gate and up of a narrowed expert that are not factored have the original's very rows.
    fn kept_rows(
        &mut self,
        spec: &TensorSpec,
        id: MatrixId,
        ours: &StoredMatrix,
        theirs: &StoredMatrix,
        kept: &[usize],
    ) {
        let (StoredMatrix::Dense(ours), StoredMatrix::Dense(theirs)) = (ours, theirs) else { return };
        if id.projection == Projection::Down {
            return;
        }
        let row_bytes = ours.bytes().len() / ours.shape()[0];
        let rows: Vec<u8> = kept
            .iter()
            .flat_map(|&channel| &ours.bytes()[channel * row_bytes..][..row_bytes])
            .copied()
            .collect();
        let rows = Tensor::new(theirs.shape().to_vec(), ours.dtype(), rows);
        match rows {
            Ok(rows) => self.same(&spec.name, &rows, theirs),
            Err(error) => {
                self.find(FindingKind::TensorDiffers, spec.name.clone(), failure::chain(&error));
            }
        }
    }

    fn name(&self, id: MatrixId) -> String {
        self.original.config().module_name(id)
    }

    fn rank(&mut self, id: MatrixId, row: Option<&RecordedMatrix>) {
        let Some(row) = row else { return };
        let in_file = self.compressed.rank(id).map(|rank| rank as u64);
        let shape = self.original.config().matrix_shape(id);
        let word = |rank: Option<u64>| rank.map_or("dense".to_owned(), |rank| format!("rank {rank}"));
        if row.rank != in_file {
            let detail = format!("the report says {}, the file has {}", word(row.rank), word(in_file));
            let name = self.name(id);
            self.find(FindingKind::RankDiffers, name, detail);
        }
        if row.shape != [shape.rows as u64, shape.cols as u64] {
            let detail = format!("the report says {:?}, the model has {shape}", row.shape);
            let name = self.name(id);
            self.find(FindingKind::RecordUnusable, name, detail);
        }
    }

    /// Byte for byte.
    fn same(&mut self, name: &str, ours: &Tensor, theirs: &Tensor) {
        if let Some(element) = theirs.first_non_finite() {
            self.find(
                FindingKind::NonFinite,
                name.to_owned(),
                format!("element {element} is NaN or infinite"),
            );
        }
        if ours.dtype() != theirs.dtype() {
            let detail = format!("is {}, in the original {}", theirs.dtype(), ours.dtype());
            self.find(FindingKind::TensorDiffers, name.to_owned(), detail);
        } else if ours.bytes() != theirs.bytes() {
            let size = ours.dtype().size_bytes() as usize;
            let elements = ours.bytes().chunks(size).zip(theirs.bytes().chunks(size));
            let differing = elements.clone().filter(|(ours, theirs)| ours != theirs).count();
            let first = elements.clone().position(|(ours, theirs)| ours != theirs).unwrap_or(0);
            let detail = format!("{differing} of {} elements differ, first {first}", ours.elements());
            self.find(FindingKind::TensorDiffers, name.to_owned(), detail);
        }
    }

    /// A matrix that is stored otherwise than the original's: as factors, or narrowed to `kept` channels.
    fn factored(
        &mut self,
        id: MatrixId,
        ours: &StoredMatrix,
        theirs: &StoredMatrix,
        kept: Option<&Vec<usize>>,
        row: Option<&RecordedMatrix>,
    ) -> FactoredMatrix {
        let factors = match theirs.factors() {
            StoredMatrix::OfBase { .. } => Vec::new(),
            StoredMatrix::Dense(w) => vec![(self.name(id), w)],
            StoredMatrix::Factored { u, v } => {
                let (u_name, v_name) = self.original.config().factor_names(id);
                vec![(u_name, u), (v_name, v)]
            }
            StoredMatrix::Pivoted { basis, coefficients, .. } => {
                let (basis_name, coefficients_name, _) = self.original.config().pivoted_names(id);
                vec![(basis_name, basis), (coefficients_name, coefficients)]
            }
        };
        for (name, factor) in factors {
            if let Some(element) = factor.first_non_finite() {
                self.find(FindingKind::NonFinite, name, format!("element {element} is NaN or infinite"));
            }
        }
        let measured = match kept {
            None => relative_error(ours, theirs),
            Some(kept) => relative_error_of_narrowed(ours, theirs, id.projection, kept),
        };
        let recorded = row.map(|row| row.relative_error);
        if let Some(recorded) = recorded {
            let dtype = self.compressed.matrix_dtype(id);
            let is_measured = kept.is_some() || matches!(theirs, StoredMatrix::OfBase { .. });
            let rounding = match rounding_energy(theirs, dtype.unit_roundoff()) {
                // Measured on what is stored.
                _ if is_measured || row.is_some_and(|row| row.calibrated_error.is_some()) => 0.0,
                // Of a zero matrix too: nothing was rounded.
                Some(0.0) => 0.0,
                Some(rounding) => rounding / energy(ours) * chance(theirs),
                None => dtype.unit_roundoff().powi(2) * chance(theirs),
            };
            let tolerance = squared_error_tolerance(recorded, rounding);
            let distance = (measured * measured - recorded * recorded).abs();
            // Written so that a NaN on either side is a finding.
            let holds = distance <= tolerance;
            if !holds {
                let detail = format!("the error is {measured:.6}, the report says {recorded:.6}");
                let name = self.name(id);
                self.find(FindingKind::ErrorDiffers, name, detail);
            }
        }
        let rank = self.compressed.rank(id);
        let MatrixShape { rows, cols } = self.compressed.config().matrix_shape(id);
        if let Some(row) = row {
            match theirs {
                // Its factors stand for themselves: W is of another size.
                StoredMatrix::OfBase { difference, .. } => self.pivots(id, row, difference, difference, 0.0),
                _ => self.pivots(id, row, ours, theirs, measured),
            }
        }
        FactoredMatrix {
            name: self.name(id),
            shape: [rows, cols],
            rank,
            relative_error: Some(measured).filter(|error| error.is_finite()),
            recorded_error: recorded,
        }
    }

    /// What the report says of pivoting. Before rounding, so a stored coefficient may lie a rounding from it; and no
    /// rounding costs more than all of its numbers in the worst direction.
    fn pivots(
        &mut self,
        id: MatrixId,
        row: &RecordedMatrix,
        ours: &StoredMatrix,
        theirs: &StoredMatrix,
        measured: f64,
    ) {
        let u = self.compressed.matrix_dtype(id).unit_roundoff();
        if let (Some(recorded), Some(largest)) = (row.largest_coefficient, largest_coefficient(theirs)) {
            let least = smallest_normal(self.compressed.matrix_dtype(id));
            let holds = (largest - recorded).abs() <= u * recorded.max(largest).max(least);
            if !holds {
                let detail =
                    format!("the largest coefficient is {largest:.6}, the report says {recorded:.6}");
                let name = self.name(id);
                self.find(FindingKind::ErrorDiffers, name, detail);
            }
        }
        if let (Some(recorded), Some(most)) = (row.round_trip_error, rounding_at_most(theirs, u)) {
            // ‖Ŵ‖ ≥ ‖W‖ − ‖W − Ŵ‖
            let most = most / (energy(ours).sqrt() * (1.0 - measured));
            let holds = recorded >= 0.0 && (recorded <= most || measured >= 1.0 || most.is_nan());
            if !holds {
                let detail = format!("rounding cost at most {most:.2e}, the report says {recorded:.2e}");
                let name = self.name(id);
                self.find(FindingKind::ErrorDiffers, name, detail);
            }
        }
    }
}
