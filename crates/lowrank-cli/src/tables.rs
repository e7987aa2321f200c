//! Tables and numbers for people.

use comfy_table::{CellAlignment, Table, presets};
use indicatif::DecimalBytes;

/// A table with a header; every column but the first is aligned to the right.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY).set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// 93405585408 → `93.41 GB`.
pub(crate) fn human_bytes(bytes: u64) -> String {
    DecimalBytes(bytes).to_string()
}

/// 0.2222 → `22.22 %`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.2} %", 100.0 * part as f64 / whole as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_decimal() {
        assert_eq!(human_bytes(93_405_585_408), "93.41 GB");
        assert_eq!(human_bytes(1_000), "1.00 kB");
        assert_eq!(human_bytes(999), "999 B");
    }
}
