//! Versions of `plan.json`: a plan has the lowest that knows all that it has.

/// Version of a `plan.json` with shared bases.
pub const PLAN_VERSION: u32 = 3;
/// Version of one without them, with widths.
pub(super) const PLAN_VERSION_WIDTHS: u32 = 2;
/// Version of one with neither: the programs that came before widths read it.
pub(super) const PLAN_VERSION_RANKS: u32 = 1;

/// What a plan of a version has.
pub(super) fn contents_of(version: u32) -> &'static str {
    match version {
        PLAN_VERSION => "with shared bases",
        PLAN_VERSION_WIDTHS => "with narrowed experts",
        _ => "without narrowed experts and shared bases",
    }
}
