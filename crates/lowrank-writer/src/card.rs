//! `README.md`: the model card, filled into the text assets beside this crate's sources.

use crate::figures::Figure;
use crate::report::{CompressionReport, MatrixReport};
use crate::template::fill;
use lowrank_model::chat::{ChatTemplate, DEFAULT, PROCESSOR_TEMPLATE_FILE};
use lowrank_model::{Family, ModelConfig, Projection, Storage, display::grouped, format};
use std::{collections::BTreeMap, fmt::Write as _};

const FACTORED: &str = include_str!("../assets/card_factored.md");
const DENSE: &str = include_str!("../assets/card_dense.md");
const NARROW: &str = include_str!("../assets/card_narrow.md");
const INSTRUCTION: &str = include_str!("../assets/card_instruction.md");

/// Content of a card in addition to the report.
#[derive(Debug, Clone, Copy, Default)]
pub struct Card<'a> {
    /// `org/name` of the base, or another plain name; never a path.
    pub base_model: Option<&'a str>,
    /// SPDX-like name from the base's own card, see [`license_of`].
    pub license: Option<&'a str>,
    /// The base's chat templates, the default first.
    pub chat_templates: &'a [ChatTemplate],
}

/// The licence named in the front matter of a model card: `apache-2.0`.
pub fn license_of(card: &str) -> Option<&str> {
    let mut lines = card.lines();
    (lines.next()?.trim_end() == "---").then_some(())?;
    let value = lines
        .take_while(|line| line.trim_end() != "---")
        .find_map(|line| line.strip_prefix("license:"))?
        .trim()
        .trim_matches(['"', '\'']);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '+');
    (!value.is_empty() && value.chars().all(plain)).then_some(value)
}

impl Card<'_> {
    /// The card of a factored checkpoint, which embeds these figures.
    pub fn factored(&self, model: &ModelConfig, report: &CompressionReport, figures: &[Figure]) -> String {
        let family = model.family;
        let has = format::Has {
            widths: !report.experts.is_empty(),
            shared_bases: !report.shared_base_layers.is_empty(),
            shared_experts: report.matrices.iter().any(|row| row.matrix.id.is_shared()),
        };
        let mut values = Self::sizes(report);
        values.extend([
            ("front_matter", self.front_matter(family, &["moe", "low-rank", "svd", "custom_code"])),
            ("storage_sentence", storage_sentence(report.storage).into()),
            ("family", family.title().into()),
            ("title", format!("{} with low-rank experts", self.short_name(family))),
            ("base_sentence", self.base_sentence(family)),
            ("load_name", self.load_name(family, "lowrank")),
            ("instruction_section", self.instruction()),
            ("rank_table", rank_table(model, &report.matrices)),
            (
                "width_sentence",
                width_sentence(model, report)
                    + &shared_base_sentence(model, report)
                    + &shared_expert_sentence(report),
            ),
            ("figures", figure_section(figures)),
            ("error_section", error_section(report)),
            ("version", report.version.clone()),
            ("format_version", has.version().to_string()),
        ]);
        let values: Vec<(&str, &str)> = values.iter().map(|(key, value)| (*key, value.as_str())).collect();
        fill(FACTORED, &values)
    }

    /// The card of an ordinary model whose experts all keep `width` channels.
    pub fn narrow(&self, model: &ModelConfig, width: usize, report: &CompressionReport) -> String {
        let family = model.family;
        let mut values = Self::sizes(report);
        values.extend([
            ("front_matter", self.front_matter(family, &["moe", "pruned"])),
            ("family", family.title().into()),
            ("title", format!("{} with narrower experts", self.short_name(family))),
            ("base_sentence", self.base_sentence(family)),
            ("width", grouped(width as u64)),
            ("intermediate_size", grouped(model.intermediate_size as u64)),
            ("width_key", family.output().width_key.into()),
            ("down", model.projection_title(Projection::Down)),
            ("load_name", self.load_name(family, "narrow")),
            ("instruction_section", self.instruction()),
            ("version", report.version.clone()),
        ]);
        let values: Vec<(&str, &str)> = values.iter().map(|(key, value)| (*key, value.as_str())).collect();
        fill(NARROW, &values)
    }

    /// What a card says of sizes and budget.
    fn sizes(report: &CompressionReport) -> Vec<(&'static str, String)> {
        let (before, after) = (report.before, report.after);
        let budget = match report.budget {
            Some(budget) => format!(
                "The budget was to remove at least {} {}. {} more were removed.",
                grouped(budget.asked),
                budget.unit,
                grouped(budget.overshoot)
            ),
            None => "The ranks were given, not chosen from a budget.".into(),
        };
        vec![
            ("params_before", grouped(before.params)),
            ("params_after", grouped(after.params)),
            ("params_removed", share(before.params.saturating_sub(after.params), before.params)),
            ("bytes_before", grouped(before.bytes)),
            ("bytes_after", grouped(after.bytes)),
            ("bytes_removed", share(before.bytes.saturating_sub(after.bytes), before.bytes)),
            ("budget_sentence", budget),
        ]
    }

    /// The card of a checkpoint whose factors were multiplied out.
    pub fn dense(&self, model: &ModelConfig) -> String {
        let family = model.family;
        fill(
            DENSE,
            &[
                ("front_matter", &self.front_matter(family, &["moe", "low-rank", "svd"])),
                ("family", family.title()),
                ("title", &format!("{}, densified", self.short_name(family))),
                ("base_sentence", &self.base_sentence(family)),
                ("load_name", &self.load_name(family, "densified")),
                ("instruction_section", &self.instruction()),
                ("version", env!("CARGO_PKG_VERSION")),
            ],
        )
    }

    fn front_matter(&self, family: &dyn Family, tags: &[&str]) -> String {
        let mut lines = Vec::new();
        // The Hub takes only `org/name` here.
        if let Some(id) = self.base_model.filter(|id| is_repo_id(id)) {
            lines.push(format!("base_model: {id}"));
        }
        if let Some(license) = self.license {
            lines.push(format!("license: {license}"));
        }
        lines.push("library_name: transformers".into());
        lines.push("pipeline_tag: text-generation".into());
        lines.push("tags:".into());
        lines.push(format!("- {}", family.model_type()));
        lines.extend(tags.iter().map(|tag| format!("- {tag}")));
        lines.join("\n")
    }

    fn base_sentence(&self, family: &dyn Family) -> String {
        match self.base_model {
            Some(id) if is_repo_id(id) => format!("[{id}](https://huggingface.co/{id})"),
            Some(name) => format!("`{name}`"),
            None => format!("A {}", family.title()),
        }
    }

    fn short_name(&self, family: &dyn Family) -> &str {
        self.base_model.map_or(family.title(), |id| id.rsplit('/').next().unwrap_or(id))
    }

    fn load_name(&self, family: &dyn Family, suffix: &str) -> String {
        format!("{}-{suffix}", self.short_name(family))
    }

    fn instruction(&self) -> String {
        let Some((ChatTemplate { name, file, text }, others)) = self.chat_templates.split_first() else {
            return "\nThe base model has no chat template: give it plain text.\n".into();
        };
        let by_name =
            if name == DEFAULT { String::new() } else { format!(", with `chat_template=\"{name}\"`,") };
        let sentence = if file == PROCESSOR_TEMPLATE_FILE {
            format!(
                "The base model's chat template, unchanged (`{file}`). `AutoProcessor` reads this file and `AutoTokenizer` does \
                 not; after `tokenizer.chat_template = json.load(open(\"{file}\"))[\"chat_template\"]`, \
                 `tokenizer.apply_chat_template`{by_name} applies it:"
            )
        } else {
            format!(
                "The base model's chat template, unchanged (`{file}`). `tokenizer.apply_chat_template`{by_name} applies it:"
            )
        };
        let others: Vec<String> =
            others.iter().map(|other| format!("`{}` (`{}`)", other.name, other.file)).collect();
        let others = match others.as_slice() {
            [] => String::new(),
            others => format!(
                "\nFurther templates of the base, unchanged, which `apply_chat_template(…, chat_template=\"NAME\")` applies: {}.\n",
                others.join(", ")
            ),
        };
        // Longer than any run of backticks inside.
        let run = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
        let fence = "`".repeat(3.max(run + 1));
        fill(
            INSTRUCTION,
            &[("template_sentence", &sentence), ("fence", &fence), ("template", text.trim_end_matches('\n'))],
        ) + &others
    }
}

/// Says how factored matrices are stored.
const fn storage_sentence(storage: Storage) -> &'static str {
    match storage {
        Storage::Uv => "each `W [m, n]` became `u [m, r] · v [r, n]`",
        Storage::Pivoted => {
            "each `W [m, n]` became a matrix of rank r, stored as an interpolative decomposition: r of its columns (or rows), and \
             the coefficients that compute the others from them, `r · (m + n − r)` numbers"
        }
    }
}

/// Says which experts have fewer channels; empty if none has.
fn width_sentence(model: &ModelConfig, report: &CompressionReport) -> String {
    let widths = || report.experts.iter().map(|row| row.width);
    let (Some(least), Some(most)) = (widths().min(), widths().max()) else { return String::new() };
    let experts = (0..model.num_hidden_layers).map(|layer| model.experts_in(layer)).sum::<usize>();
    format!(
        "\n\n{} of {experts} experts keep {least} to {most} of their {} channels (rows of {} and {}, columns of {}); {} is \
         fitted to those that stay.",
        grouped(report.experts.len() as u64),
        model.intermediate_size,
        model.projection_title(Projection::Gate),
        model.projection_title(Projection::Up),
        model.projection_title(Projection::Down),
        model.projection_title(Projection::Down),
    )
}

/// Says in which layers the experts share a base; empty if in none.
fn shared_base_sentence(model: &ModelConfig, report: &CompressionReport) -> String {
    let layers = report.shared_base_layers.len();
    if layers == 0 {
        return String::new();
    }
    format!(
        "\n\nIn {layers} of {} layers the experts share a base B, the mean of their matrices: there a factored `W` is B plus its \
         factors, which stand for `W − B`.",
        model.num_hidden_layers,
    )
}

/// Says which ranks the shared experts have; empty if they were not compressed.
fn shared_expert_sentence(report: &CompressionReport) -> String {
    let rows = || report.matrices.iter().filter(|row| row.matrix.id.is_shared());
    let ranks = || rows().filter_map(|row| row.rank);
    let (Some(least), Some(most)) = (ranks().min(), ranks().max()) else { return String::new() };
    format!(
        "\n\nThe experts that every token takes were compressed, too: {} of their {} matrices have ranks from {least} to {most}. \
         The table counts them among the others.",
        ranks().count(),
        rows().count(),
    )
}

/// `org/name` as the Hub allows it.
fn is_repo_id(id: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.starts_with('.')
    };
    id.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

fn share(part: u64, whole: u64) -> String {
    format!("{} ({:.2} %)", grouped(part), 100.0 * part as f64 / whole.max(1) as f64)
}

/// One line per layer: ranks of the experts in each projection, and the layer's error.
fn rank_table(model: &ModelConfig, matrices: &[MatrixReport]) -> String {
    let mut layers: BTreeMap<usize, Vec<&MatrixReport>> = BTreeMap::new();
    for row in matrices {
        layers.entry(row.matrix.id.layer).or_default().push(row);
    }
    let titles = Projection::ALL.map(|projection| model.projection_title(projection)).join(" | ");
    let mut table = format!("| Layer | {titles} | Error |\n|---:|---|---|---|---:|\n");
    for (layer, rows) in layers {
        let cell = |projection: Projection| {
            let of: Vec<&&MatrixReport> =
                rows.iter().filter(|row| row.matrix.id.projection == projection).collect();
            let ranks: Vec<usize> = of.iter().filter_map(|row| row.rank).collect();
            let dense = of.len() - ranks.len();
            let span = match (ranks.iter().min(), ranks.iter().max()) {
                (Some(least), Some(most)) => {
                    let mean = ranks.iter().sum::<usize>() as f64 / ranks.len() as f64;
                    format!("{least} / {mean:.1} / {most}")
                }
                _ => String::new(),
            };
            match (span.is_empty(), dense) {
                (true, _) => "dense".into(),
                (false, 0) => span,
                (false, dense) => format!("{span}, {dense} dense"),
            }
        };
        let ranks = Projection::ALL.map(cell).join(" | ");
        let error = rms(rows.iter().map(|row| row.relative_error));
        writeln!(table, "| {layer} | {ranks} | {error:.4} |").expect("a String takes all");
    }
    table.truncate(table.trim_end().len());
    table
}

fn figure_section(figures: &[Figure]) -> String {
    let lines: Vec<String> =
        figures.iter().map(|figure| format!("![{}]({})", figure.caption, figure.file)).collect();
    lines.join("\n\n")
}

fn rms(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value * value, count + 1));
    (sum / f64::from(count.max(1))).sqrt()
}

fn error_section(report: &CompressionReport) -> String {
    let factored = || report.matrices.iter().filter(|row| row.rank.is_some());
    let count = factored().count();
    let mut text = format!(
        "{count} of {} expert matrices are factored. Their relative error `‖W − Ŵ‖ / ‖W‖` {}: {:.4} (root mean square), \
         {:.4} at most.",
        report.matrices.len(),
        report.error_basis(),
        rms(factored().map(|row| row.relative_error)),
        factored().map(|row| row.relative_error).fold(0.0, f64::max),
    );
    text.push_str(&excess_sentence(factored().map(|row| row.excess_over_optimum)));
    if let Some(gap) = report.optimality.and_then(|optimality| optimality.duality_gap) {
        write!(
            text,
            " The total squared error of these ranks is at most {:.3} % above the smallest that any ranks within the budget can have.",
            100.0 * gap
        )
        .expect("a String takes all");
    }
    text
}

/// How far factors are from the best of their rank, and for how many that is known; empty if for none.
fn excess_sentence(excesses: impl Iterator<Item = Option<f64>>) -> String {
    let (known, unknown): (Vec<Option<f64>>, Vec<_>) = excesses.partition(Option::is_some);
    let Some(excess) = known.iter().flatten().copied().reduce(f64::max) else { return String::new() };
    let bound = format!("more than {excess:.1e} above the best that any factors of its rank can reach");
    match unknown.len() {
        0 => format!(" None is {bound}."),
        others => format!(
            " How far a matrix is from the best of its rank is known for {} of them: none of these is {bound}. For the other \
             {others} it is not known.",
            known.len()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::all;
    use crate::report::tests::{calibrated, model, report};
    use std::path::PathBuf;

    #[test]
    fn a_card_has_front_matter_numbers_template_and_no_open_key() {
        let template = ChatTemplate {
            name: "default".into(),
            file: "chat_template.jinja".into(),
            text: "{{ bos_token }} [INST] {title} ```` [/INST]".into(),
        };
        let card = Card {
            base_model: Some("org/base"),
            license: Some("apache-2.0"),
            chat_templates: std::slice::from_ref(&template),
        };
        let text = card.factored(&model(), &report(), &all(&model(), &report(), None));
        let front = concat!(
            "---\nbase_model: org/base\nlicense: apache-2.0\nlibrary_name: transformers\n",
            "pipeline_tag: text-generation\ntags:\n- mixtral\n- moe\n- low-rank\n- svd\n- custom_code\n---\n"
        );
        assert!(text.starts_with(front), "{text}");
        assert!(text.contains("| before | 1,000,000 | 2,000,000 |"));
        // Verbatim, inside a fence that its own backticks do not close.
        assert!(text.contains(&format!("`````jinja\n{}\n`````\n", template.text)));
        assert!(text.contains("| 0 | 40 / 40.5 / 41 | 40 / 40.5 / 41 | dense | 0.2041 |"), "{text}");
        assert!(text.contains("\n![Rank of every expert matrix](lowrank_ranks.svg)\n"), "{text}");
        assert!(!text.contains("lowrank_spectra.svg"), "not drawn, so not shown");
        assert!(text.contains("from_pretrained(\"base-lowrank\", trust_remote_code=True"));
        let without_template = text.replace(&template.text, "");
        assert!(!without_template.contains("{{"), "a key is left: {text}");
        assert_eq!(text, card.factored(&model(), &report(), &all(&model(), &report(), None)));
    }

    #[test]
    fn the_error_section_says_what_each_number_is_and_claims_nothing_of_unknown_excesses() {
        let text = error_section(&report());
        assert!(
            text.contains("`‖W − Ŵ‖ / ‖W‖` before rounding to the stored number format: 0.2500"),
            "{text}"
        );
        assert!(text.contains(" None is more than 1.0e-7 above"), "{text}");
        let text = error_section(&calibrated(0));
        assert!(text.contains("`‖W − Ŵ‖ / ‖W‖` of the stored values: 0.2500"), "{text}");
        assert!(!text.contains("more than"), "{text}");
        let text = error_section(&calibrated(3));
        assert!(text.contains("known for 3 of them: none of these is more than 1.0e-7 above"), "{text}");
        assert!(text.contains("For the other 5 it is not known."), "{text}");
    }

    #[test]
    fn a_base_without_a_hub_name_gets_no_base_model_key() {
        for name in [None, Some("tiny-mixtral"), Some("a/b/c")] {
            let card = Card { base_model: name, ..Card::default() };
            assert!(
                !card.factored(&model(), &report(), &all(&model(), &report(), None)).contains("base_model:"),
                "{name:?}"
            );
            assert!(card.dense(&model()).contains("saves no memory"));
        }
    }

    #[test]
    fn the_licence_is_taken_from_front_matter_only() {
        assert_eq!(license_of("---\nlanguage:\n- en\nlicense: apache-2.0\n---\n# x"), Some("apache-2.0"));
        assert_eq!(license_of("---\nlicense: \"mit\"\n---\n"), Some("mit"));
        assert_eq!(license_of("---\na: b\n---\nlicense: mit\n"), None);
        assert_eq!(license_of("license: mit\n"), None);
        assert_eq!(license_of("---\nlicense: [a, b]\n---\n"), None);
    }

    /// Names, files and texts of the templates in a folder with these files.
    fn found(files: &[(&str, &str)]) -> Vec<ChatTemplate> {
        let names: Vec<PathBuf> = files.iter().map(|(name, _)| name.into()).collect();
        ChatTemplate::find(&names, |name| {
            files.iter().find(|(file, _)| *file == name).map(|(_, text)| text.as_bytes().to_vec())
        })
    }

    #[test]
    fn a_card_names_every_template_and_who_reads_it() {
        let card = |files: &[(&str, &str)]| {
            Card { chat_templates: &found(files), ..Card::default() }.dense(&model())
        };
        let both =
            card(&[("chat_template.jinja", "{{ b }}"), ("additional_chat_templates/rag.jinja", "{{ c }}")]);
        assert!(both.contains("```jinja\n{{ b }}\n```\n"), "{both}");
        assert!(both.contains("`rag` (`additional_chat_templates/rag.jinja`)"), "{both}");
        let only_named = card(&[("additional_chat_templates/rag.jinja", "{{ c }}")]);
        assert!(only_named.contains("`chat_template=\"rag\"`"), "{only_named}");
        let processor = card(&[("chat_template.json", r#"{"chat_template": "{{ f }}"}"#)]);
        assert!(processor.contains("`AutoProcessor` reads this file"), "{processor}");
        for card in [both, only_named, processor] {
            assert!(!card.contains("no chat template"), "{card}");
        }
        assert!(card(&[]).contains("no chat template"));
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (46_702_792_704, "46,702,792,704")] {
            assert_eq!(grouped(number), text);
        }
    }
}
