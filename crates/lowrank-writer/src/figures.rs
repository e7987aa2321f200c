//! The figures of the model card: SVG files beside it, a pure function of the report and the selected singular values.
//!
//! | File | Shows |
//! |---|---|
//! | [`RANKS_FILE`] | the rank of every expert matrix, layer × expert, one panel per projection |
//! | [`ERRORS_FILE`] | the relative error of every expert matrix, arranged in the same way |
//! | [`SPECTRA_FILE`] | σᵢ/σ₁ on logarithmic axes, one line per layer, a dot at the chosen rank |

use crate::report::{CompressionReport, MatrixReport};
use lowrank_model::{MatrixId, ModelConfig, Projection, SpectrumCurves};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::collections::BTreeMap;

/// Ranks.
pub const RANKS_FILE: &str = "lowrank_ranks.svg";
/// Relative errors.
pub const ERRORS_FILE: &str = "lowrank_errors.svg";
/// Spectra with the chosen ranks.
pub const SPECTRA_FILE: &str = "lowrank_spectra.svg";

const WIDTH_PX: u32 = 960;
const FONT: &str = "sans-serif";
/// Colour of a matrix that was left dense.
const DENSE: RGBColor = RGBColor(222, 222, 222);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figure {
    /// Its name beside the card.
    pub file: &'static str,
    /// Its caption.
    pub caption: &'static str,
    /// Its content.
    pub svg: String,
}

/// All figures for which there is data.
pub fn all(model: &ModelConfig, report: &CompressionReport, curves: Option<&SpectrumCurves>) -> Vec<Figure> {
    let mut all = vec![
        Figure { file: RANKS_FILE, caption: "Rank of every expert matrix", svg: ranks(model, report) },
        Figure {
            file: ERRORS_FILE,
            caption: "Relative error of every expert matrix",
            svg: errors(model, report),
        },
    ];
    if let Some(curves) = curves {
        let caption = "Singular values and chosen ranks";
        all.push(Figure { file: SPECTRA_FILE, caption, svg: spectra(model, report, curves) });
    }
    all
}

/// Ranks as a heat map.
pub fn ranks(model: &ModelConfig, report: &CompressionReport) -> String {
    let value = |row: &MatrixReport| row.rank.map(|rank| rank as f64);
    heat_map(model, report, "Rank", &|rank| format!("{rank:.0}"), &value)
}

/// Relative errors as a heat map.
pub fn errors(model: &ModelConfig, report: &CompressionReport) -> String {
    let value = |row: &MatrixReport| row.rank.map(|_| row.relative_error);
    heat_map(model, report, "‖W − Ŵ‖ / ‖W‖", &|error| format!("{error:.3}"), &value)
}

/// Draws into a string, which cannot fail.
fn svg(height_px: u32, draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH_PX, height_px)).into_drawing_area();
        root.fill(&WHITE)
            .and_then(|()| draw(&root))
            .and_then(|()| root.present())
            .expect("a string takes all");
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// `share` runs from 0 to 1.
fn colour(share: f64) -> RGBColor {
    ViridisRGB.get_color(share.clamp(0.0, 1.0))
}

fn heat_map(
    model: &ModelConfig,
    report: &CompressionReport,
    name: &str,
    show: &dyn Fn(f64) -> String,
    value: &dyn Fn(&MatrixReport) -> Option<f64>,
) -> String {
    let layers = 1 + report.matrices.iter().map(|row| row.matrix.id.layer).max().unwrap_or(0);
    // A shared expert stands behind the routed ones.
    let of_routed = report.matrices.iter().map(|row| row.matrix.id).filter(|id| !id.is_shared());
    let routed = 1 + of_routed.map(|id| id.expert).max().unwrap_or(0);
    let has_shared = report.matrices.iter().any(|row| row.matrix.id.is_shared());
    let experts = routed + usize::from(has_shared);
    let values = || report.matrices.iter().filter_map(value);
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let span = if high > low { high - low } else { 1.0 };
    let cell_px = (400 / layers as u32).clamp(10, 40);
    svg(cell_px * layers as u32 + 130, |root| {
        let (legend, body) = root.split_vertically(44);
        key(&legend, name, (low.is_finite()).then(|| (show(low), show(high))))?;
        for (panel, projection) in body.split_evenly((1, 3)).iter().zip(Projection::ALL) {
            let mut chart = ChartBuilder::on(panel)
                .caption(model.projection_title(projection), (FONT, 17))
                .margin(8)
                .x_label_area_size(34)
                .y_label_area_size(44)
                .build_cartesian_2d(-0.5..experts as f64 - 0.5, layers as f64 - 0.5..-0.5)?;
            let whole = |at: &f64| if at.fract().abs() < 1e-9 { format!("{at:.0}") } else { String::new() };
            let expert = |at: &f64| if *at == routed as f64 { "shared".to_owned() } else { whole(at) };
            chart
                .configure_mesh()
                .disable_mesh()
                .x_labels(experts.min(16))
                .y_labels(layers.min(20))
                .x_label_formatter(&expert)
                .y_label_formatter(&whole)
                .x_desc("expert")
                .y_desc("layer")
                .label_style((FONT, 13))
                .draw()?;
            let rows = report.matrices.iter().filter(|row| row.matrix.id.projection == projection);
            chart.draw_series(rows.map(|row| {
                let MatrixId { layer, expert, .. } = row.matrix.id;
                let (x, y) = (expert.min(routed) as f64, layer as f64);
                let fill = value(row).map_or(DENSE, |value| colour((value - low) / span));
                Rectangle::new([(x - 0.48, y - 0.48), (x + 0.48, y + 0.48)], fill.filled())
            }))?;
        }
        Ok(())
    })
}

/// The colour key: a bar with labels at its ends, and the colour of dense matrices.
fn key(area: &Area<'_>, name: &str, ends: Option<(String, String)>) -> Drawn {
    const STEPS: i32 = 48;
    let text = |words: &str, at: (i32, i32)| Text::new(words.to_owned(), at, (FONT, 15));
    area.draw(&text(name, (16, 16)))?;
    let mut x = 170;
    if let Some((low, high)) = ends {
        area.draw(&text(&low, (x, 16)))?;
        x += 52;
        for step in 0..STEPS {
            let fill = colour(f64::from(step) / f64::from(STEPS - 1)).filled();
            let left = x + step * 4;
            area.draw(&Rectangle::new([(left, 14), (left + 4, 32)], fill))?;
        }
        x += STEPS * 4 + 10;
        area.draw(&text(&high, (x, 16)))?;
        x += 80;
    }
    area.draw(&Rectangle::new([(x, 14), (x + 18, 32)], DENSE.filled()))?;
    area.draw(&text("left dense", (x + 26, 16)))
}

/// Spectra on logarithmic axes.
pub fn spectra(model: &ModelConfig, report: &CompressionReport, curves: &SpectrumCurves) -> String {
    let ranks: BTreeMap<MatrixId, usize> =
        report.matrices.iter().filter_map(|row| Some((row.matrix.id, row.rank?))).collect();
    let rows: Vec<(MatrixId, &Vec<f64>)> =
        curves.matrices.iter().filter_map(|row| Some((model.matrix_named(&row.name)?, &row.sigma))).collect();
    let layers = 1 + rows.iter().map(|(id, _)| id.layer).max().unwrap_or(0);
    let last = curves.index.last().copied().unwrap_or(1).max(2);
    // Median over the experts of a layer, of σᵢ/σ₁.
    let line = |layer: usize, projection: Projection| -> Vec<(f64, f64)> {
        let of = rows
            .iter()
            .filter(|(id, sigma)| id.layer == layer && id.projection == projection && sigma[0] > 0.0);
        let rows: Vec<&Vec<f64>> = of.map(|(_, sigma)| *sigma).collect();
        let points = curves.index.iter().enumerate().filter(|_| !rows.is_empty()).map(|(k, &index)| {
            (index as f64, median(rows.iter().map(|sigma| sigma[k] / sigma[0]).collect()))
        });
        points.filter(|&(_, share)| share > 0.0).collect()
    };
    let all = (0..layers).flat_map(|layer| Projection::ALL.into_iter().flat_map(move |p| line(layer, p)));
    let floor = all.map(|(_, share)| share).fold(1.0, f64::min).max(1e-12);
    svg(360, |root| {
        let (legend, body) = root.split_vertically(44);
        let words = "σᵢ / σ₁, median of the experts. One line per layer, first dark, last bright; the dot is the median rank.";
        legend.draw(&Text::new(words, (16, 16), (FONT, 15)))?;
        for (panel, projection) in body.split_evenly((1, 3)).iter().zip(Projection::ALL) {
            let mut chart = ChartBuilder::on(panel)
                .caption(model.projection_title(projection), (FONT, 17))
                .margin(8)
                .x_label_area_size(34)
                .y_label_area_size(56)
                .build_cartesian_2d((1.0..last as f64).log_scale(), (floor * 0.8..1.25).log_scale())?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_desc("i")
                .x_label_formatter(&|i| format!("{i:.0}"))
                .y_labels(5)
                .y_label_formatter(&|&share| short(share))
                .label_style((FONT, 13))
                .draw()?;
            for layer in 0..layers {
                let points = line(layer, projection);
                let shade = colour(0.9 * layer as f64 / layers as f64);
                let of_layer =
                    ranks.iter().filter(|(id, _)| id.layer == layer && id.projection == projection);
                let cuts: Vec<f64> = of_layer.map(|(_, &rank)| rank as f64).collect();
                if !cuts.is_empty() && !points.is_empty() {
                    let rank = median(cuts);
                    chart.draw_series([Circle::new((rank, at(&points, rank)), 4, shade.filled())])?;
                }
                chart.draw_series(LineSeries::new(points, shade.stroke_width(1)))?;
            }
        }
        Ok(())
    })
}

/// 0.30000000000000004 → `0.3`, 0.0002 → `2e-4`.
fn short(share: f64) -> String {
    if share < 0.01 {
        return format!("{share:.0e}");
    }
    let text = format!("{share:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The lower one of two middles.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

/// The curve's height at `x`, interpolated linearly on logarithmic axes.
fn at(points: &[(f64, f64)], x: f64) -> f64 {
    let after = points.partition_point(|&(index, _)| index < x).clamp(1, points.len().max(2) - 1);
    match (points.get(after - 1), points.get(after)) {
        (Some(&(x0, y0)), Some(&(x1, y1))) => {
            let share = ((x.ln() - x0.ln()) / (x1.ln() - x0.ln())).clamp(0.0, 1.0);
            (y0.ln() + share * (y1.ln() - y0.ln())).exp()
        }
        (Some(&(_, y)), None) => y,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{model, report};
    use lowrank_model::Spectrum;

    /// Fill colours of a figure's rectangles, in order.
    fn fills(svg: &str) -> Vec<&str> {
        svg.lines()
            .filter(|line| line.starts_with("<rect"))
            .filter_map(|line| line.split("fill=\"").nth(1)?.split('"').next())
            .collect()
    }

    #[test]
    fn every_matrix_is_a_cell_and_dense_ones_are_grey() {
        let report = report();
        let (ranks, errors) = (ranks(&model(), &report), errors(&model(), &report));
        // Background, 48 steps of the key, the key's grey, and 12 cells.
        assert_eq!(fills(&ranks).len(), 1 + 48 + 1 + 12, "{ranks}");
        let grey = fills(&ranks).into_iter().filter(|fill| *fill == "#DEDEDE").count();
        assert_eq!(grey, 1 + 4);
        // Four ranks in two projections: lowest and highest are the ends of the scale.
        assert_eq!(fills(&ranks).into_iter().filter(|fill| *fill == fills(&ranks)[1]).count(), 1 + 2);
        assert!(ranks.contains("w3 (up)") && ranks.contains("\n40\n") && ranks.contains("\n49\n"), "{ranks}");
        assert!(errors.contains("\n0.250\n"), "{errors}");
        assert_eq!(ranks, super::ranks(&model(), &report));
    }

    #[test]
    fn spectra_have_a_line_for_each_layer_and_a_dot_for_each_cut() {
        let report = report();
        let falling = Spectrum::new((1..=128).map(|i| 1.0 / f64::from(i)).collect()).unwrap();
        let curves =
            SpectrumCurves::of(report.matrices.iter().map(|row| (row.matrix.name.clone(), &falling)))
                .unwrap();
        let svg = spectra(&model(), &report, &curves);
        assert_eq!(svg.matches("<circle").count(), 4, "two layers, gate and down: {svg}");
        let curve =
            svg.lines().filter(|line| line.starts_with("<polyline") && line.matches(',').count() > 20);
        assert_eq!(curve.count(), 6, "two layers, three projections: {svg}");
    }

    #[test]
    fn a_height_between_two_points_lies_on_the_straight_line_of_logarithms() {
        let points: Vec<(f64, f64)> = [1.0, 4.0, 16.0].map(|i| (i, 1.0 / i)).to_vec();
        for x in [1.0, 2.0, 3.0, 10.0, 16.0] {
            assert!((at(&points, x) * x - 1.0).abs() < 1e-12, "{x}");
        }
    }

    #[test]
    fn a_plan_that_leaves_all_dense_is_drawn_too() {
        let mut report = report();
        report.matrices.iter_mut().for_each(|row| row.rank = None);
        assert_eq!(fills(&ranks(&model(), &report)).len(), 1 + 1 + 12);
    }
}
