//! The figures and the sentence of the gradients, made from the rows.

use crate::alignment::Part;
use crate::error::Result;
use crate::gradients::rows::{DRAW, GROUPS, GradientRow, MODELS};
use crate::plot::{Bar, BarChart, Line, Panel, PanelChart, Point, Scale, Svg, bars, panels};
use crate::stats::standard_deviation;
use crate::subject::Mean;

pub(super) fn plot(rows: &[GradientRow]) -> Result<Option<Svg>> {
    let mut found = Vec::new();
    for group in GROUPS {
        for model in MODELS {
            if let Some(norm) = token_norm(rows, model, group) {
                found.push(norm.bar(&group.replace('_', " ")).in_series(model));
            }
        }
        let draws: Vec<f64> =
            draws_of(rows).iter().filter_map(|draw| Some(token_norm(rows, draw, group)?.mean)).collect();
        if let Some(spread) = Spread::of(&draws) {
            let bar = Mean { mean: spread.mean, se: Some(spread.sd) }.bar(&group.replace('_', " "));
            found.push(bar.in_series(format!("start, {} draws", draws.len())));
        }
    }
    let of = if has_adapter(rows) { "the adapter" } else { "the final residual stream" };
    let chart = BarChart {
        title: format!("Gradient of one token's loss by {of}"),
        value_label: if draws_of(rows).is_empty() {
            "norm of the gradient (nats), mean ± s.e. over tokens"
        } else {
            "norm of the gradient (nats), mean ± s.e. over tokens; draws: ± s.d. of them"
        }
        .to_owned(),
        bars: found,
        references: Vec::new(),
    };
    Ok(Some(bars(&chart)?))
}

pub(super) fn more_plots(rows: &[GradientRow]) -> Result<Vec<(&'static str, Svg)>> {
    let found = [("layers", by_layer(rows)?), ("parts", by_part(rows)?)];
    Ok(found.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect())
}

/// The norms layer by layer: a panel for each model, a line for each group of tokens.
pub(super) fn layer_panels(rows: &[GradientRow]) -> Vec<Panel> {
    let in_layers = || rows.iter().filter(|row| row.scope == "token_layer");
    let adapter = has_adapter(rows);
    let n_layers = in_layers().filter_map(|row| row.layer).max().map_or(0, |last| last + 1);
    let point = |model: &str, group: &str, layer: usize| {
        let here = in_layers().filter(|row| row.model == model && row.group == group && row.layer == Some(layer));
        let norms: Vec<f64> =
            here.filter_map(|row| if adapter { row.lora_grad_norm } else { row.resid_grad_norm }).collect();
        let mean = (!norms.is_empty()).then(|| Mean::of(&norms))?;
        let point = Point::new(layer as f64, mean.mean);
        Some(mean.se.map_or(point, |se| point.with_interval((mean.mean - se, mean.mean + se))))
    };
    let line = |model: &str, group: &str| {
        let points: Vec<Point> = (0..n_layers).filter_map(|layer| point(model, group, layer)).collect();
        (!points.is_empty()).then(|| Line { label: group.replace('_', " "), points })
    };
    let panel = |model: &&str| Panel {
        y_label: (*model).to_owned(),
        lines: GROUPS.iter().filter_map(|group| line(model, group)).collect(),
        references: Vec::new(),
    };
    MODELS.iter().map(panel).filter(|panel| !panel.lines.is_empty()).collect()
}

fn by_layer(rows: &[GradientRow]) -> Result<Option<Svg>> {
    let found = layer_panels(rows);
    if found.is_empty() {
        return Ok(None);
    }
    let of = if has_adapter(rows) { "the block's adapter" } else { "the residual stream after the block" };
    let chart = PanelChart {
        title: format!("Gradient of one token's loss by {of}"),
        x_label: "block (norm in nats, mean ± s.e. over tokens)".to_owned(),
        x_scale: Scale::Linear,
        panels: found,
    };
    Ok(Some(panels(&chart)?))
}

/// The share of each part of the chat in both groups' gradients, at the student.
fn by_part(rows: &[GradientRow]) -> Result<Option<Svg>> {
    let at = |part: Part, group: &str| {
        let is_here = |row: &&GradientRow| {
            row.scope == "part"
                && row.model == "student"
                && row.group == group
                && row.part.as_deref() == Some(part.name())
        };
        Some(Bar::new(part.name(), rows.iter().find(is_here)?.share?).in_series(group.replace('_', " ")))
    };
    let found: Vec<Bar> = Part::ALL
        .into_iter()
        .flat_map(|part| ["divergent_digit", "rest"].map(|group| at(part, group)))
        .flatten()
        .collect();
    if found.is_empty() {
        return Ok(None);
    }
    let chart = BarChart {
        title: "Through which part of the chat the student's adapter is pulled at".to_owned(),
        value_label: "share of the group's summed gradient".to_owned(),
        bars: found,
        references: Vec::new(),
    };
    Ok(Some(bars(&chart)?))
}

pub(super) fn reading(rows: &[GradientRow]) -> String {
    let of = if has_adapter(rows) { "adapter" } else { "final residual stream" };
    let compared =
        |model: &str| Some((token_norm(rows, model, "divergent_digit")?, token_norm(rows, model, "other_digit")?));
    let Some((divergent, other)) = compared("student") else {
        return "There were not both divergent and other digits to compare.".to_owned();
    };
    let n = |group: &str| rows.iter().filter(|row| is_token(row, "student", group)).count();
    let error = (divergent.se.unwrap_or_default().powi(2) + other.se.unwrap_or_default().powi(2)).sqrt();
    let verdict = if (divergent.mean - other.mean).abs() > 2.0 * error && error > 0.0 { "more than" } else { "within" };
    let ratio = |model: &str| {
        let (divergent, other) = compared(model)?;
        other.share(divergent.mean)
    };
    let times = match ratio("student") {
        Some(ratio) => format!("is {ratio:.2} times as long as another digit's"),
        None => "stands beside another digit's, which is not three standard errors above zero".to_owned(),
    };
    let draws = draws_of(rows);
    let is_known = rows.iter().any(|row| row.model == "start");
    let at_start = match (ratio("start"), Spread::over(&draws, ratio).map(|spread| spread.said(2))) {
        (Some(own), Some(others)) => format!("; at the start of its training the ratio was {own:.2} ({others})"),
        (Some(own), None) => format!("; at the start of its training the ratio was {own:.2}"),
        (None, others) if !is_known && !draws.is_empty() => {
            let others = others.map(|others| format!(": at such starts the ratio is {others}"));
            format!("; where its training began is not known{}", others.unwrap_or_default())
        }
        (None, _) => String::new(),
    };
    let control = match ratio("control") {
        Some(ratio) => format!("; at the control student the ratio is {ratio:.2}"),
        None if compared("control").is_some() => String::new(),
        None => "; there is no control student".to_owned(),
    };
    format!(
        "At the student, a divergent digit's gradient of the {of} {times} ({:.4} and {:.4}, \
         {} and {} tokens; the difference is {verdict} two standard errors){at_start}{control}{}.",
        divergent.mean,
        other.mean,
        n("divergent_digit"),
        n("other_digit"),
        together(rows, &draws).unwrap_or_default(),
    )
}

/// The sentence on the groups' summed gradients, at the student and at its start.
fn together(rows: &[GradientRow], draws: &[&str]) -> Option<String> {
    let group = |model: &str, group: &str| {
        rows.iter().find(|row| row.scope == "group" && row.model == model && row.group == group)
    };
    let (divergent, rest) = (group("student", "divergent_digit")?, group("student", "rest")?);
    let parts = rows.iter().filter(|row| row.scope == "part" && row.model == "student" && row.group == divergent.group);
    let most = parts.filter(|row| row.share.is_some());
    let most = most.max_by(|a, b| a.share.unwrap_or_default().total_cmp(&b.share.unwrap_or_default()));
    let through =
        most.and_then(|most| Some(format!(", {:.0} % of it through `{}`", 100.0 * most.share?, most.part.as_deref()?)));
    let hold = match divergent.share {
        Some(share) => format!("hold {:.0} % of the squared gradient", 100.0 * share),
        None => "have no share of the whole gradient, as that is not three standard errors above zero".to_owned(),
    };
    let alignment = |model: &str| group(model, "divergent_digit")?.alignment;
    let draws = Spread::over(draws, alignment).map(|spread| spread.signed(3));
    let start = match (alignment("start"), draws) {
        (Some(own), Some(draws)) => format!("; at the start of its training {own:+.3} ({draws})"),
        (Some(own), None) => format!("; at the start of its training {own:+.3}"),
        (None, Some(draws)) => format!("; at such starts {draws}"),
        (None, None) => String::new(),
    };
    Some(format!(
        "; all divergent digits together {hold}, at a cosine of {:+.2} with the rest's{}; a step down \
         their mean loss changes log p(target) by {:+.3} nats per unit of learning rate, one down the rest's by {:+.3}{start}",
        divergent.cosine?,
        through.unwrap_or_default(),
        divergent.alignment?,
        rest.alignment?,
    ))
}

/// The mean and standard deviation of a number over draws.
#[derive(Clone, Copy)]
struct Spread {
    mean: f64,
    sd: f64,
    n: usize,
}

impl Spread {
    /// The spread of these values; `None` if there are fewer than two.
    fn of(values: &[f64]) -> Option<Self> {
        Some(Self { mean: Mean::of(values).mean, sd: standard_deviation(values).ok()?, n: values.len() })
    }

    /// The spread of a number over the draws. `of` returns it for a draw's name in the column `model`.
    fn over(draws: &[&str], of: impl Fn(&str) -> Option<f64>) -> Option<Self> {
        Self::of(&draws.iter().filter_map(|draw| of(draw)).collect::<Vec<_>>())
    }

    fn said(self, digits: usize) -> String {
        format!("{:.digits$} ± {:.digits$} over {} draws of its A", self.mean, self.sd, self.n)
    }

    fn signed(self, digits: usize) -> String {
        if self.mean < 0.0 { self.said(digits) } else { format!("+{}", self.said(digits)) }
    }
}

/// The names of the draws, in the order of the rows.
fn draws_of(rows: &[GradientRow]) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.model.starts_with(DRAW)) {
        if found.last() != Some(&row.model.as_str()) {
            found.push(&row.model);
        }
    }
    found
}

fn is_token(row: &GradientRow, model: &str, group: &str) -> bool {
    row.scope == "token" && row.model == model && row.group == group
}

fn has_adapter(rows: &[GradientRow]) -> bool {
    rows.iter().any(|row| row.scope == "token" && row.lora_grad_norm.is_some())
}

/// The mean length of a group's token gradients: the adapter's if there is one, else the final residual stream's.
fn token_norm(rows: &[GradientRow], model: &str, group: &str) -> Option<Mean> {
    let adapter = has_adapter(rows);
    let norm = |row: &GradientRow| if adapter { row.lora_grad_norm } else { row.hidden_grad_norm };
    let norms: Vec<f64> = rows.iter().filter(|row| is_token(row, model, group)).filter_map(norm).collect();
    (!norms.is_empty()).then(|| Mean::of(&norms))
}
