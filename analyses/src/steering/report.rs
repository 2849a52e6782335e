//! The figure and the sentence of steering, made from the rows.

use crate::error::Result;
use crate::plot::{BarChart, Reference, Svg, bars};
use crate::steering::rows::SteeringRow;
use crate::subject::Mean;

pub(super) fn plot(rows: &[SteeringRow]) -> Result<Option<Svg>> {
    let Some(first) = rows.first() else { return Ok(None) };
    let bar = |row: &SteeringRow| {
        let what = row.coefficient.map_or("taken out".to_owned(), |coefficient| format!("× {coefficient}"));
        let label = if of_all_blocks(row) {
            let who = if row.kind.starts_with("replace") { "student as the base" } else { "base as the student" };
            format!("all blocks, {who}")
        } else {
            format!("block {} {what}", row.layer)
        };
        let kind = match row.kind.as_str() {
            "learned" | "project_out" | "replace" | "transplant" => "learned",
            "project_out_base" => "learned, out of the base",
            "control_student" => "control",
            "random" | "project_out_random" | "replace_random" | "transplant_random" => "random",
            other => other,
        };
        let spread = row.delta_logp_sd.or(row.delta_logp_se);
        Mean { mean: row.delta_logp, se: spread }.bar(&label).in_series(kind.replace('_', " "))
    };
    // Bars with the same label must be neighbours.
    let mut ordered: Vec<&SteeringRow> = rows.iter().collect();
    let place = |row: &SteeringRow| (of_all_blocks(row), row.kind.starts_with("transplant"), row.layer);
    let size = |row: &SteeringRow| row.coefficient.unwrap_or(f64::INFINITY);
    ordered.sort_by(|a, b| place(a).cmp(&place(b)).then(size(a).total_cmp(&size(b))));
    let chart = BarChart {
        title: format!("Change in log p({}) by a direction: added to the base, or taken out", first.target),
        value_label: match rows.iter().find(|row| row.delta_logp_sd.is_some()).and_then(|row| row.n_random) {
            Some(n) => format!("change against the base (nats), mean ± s.e. over questions; random: ± s.d. of {n}"),
            None => "change against the base (nats), mean ± s.e. over questions".to_owned(),
        },
        bars: ordered.into_iter().map(bar).collect(),
        references: vec![Reference::new("base", 0.0), Reference::new("student", first.student_delta_logp)],
    };
    Ok(Some(bars(&chart)?))
}

fn of_all_blocks(row: &SteeringRow) -> bool {
    row.kind.starts_with("replace") || row.kind.starts_with("transplant")
}

pub(super) fn reading(rows: &[SteeringRow]) -> String {
    let of = |kind: &'static str| rows.iter().filter(move |row| row.kind == kind);
    let by_size = |a: &&SteeringRow, b: &&SteeringRow| a.delta_logp.abs().total_cmp(&b.delta_logp.abs());
    let Some(first) = of("learned").next() else { return "Nothing was measured.".to_owned() };
    // A zero vector has no direction and moves nothing.
    let Some(best) = of("learned").filter(|row| row.vector_norm > 0.0).max_by(by_size) else {
        let mut blocks: Vec<usize> = of("learned").map(|row| row.layer).collect();
        blocks.dedup();
        return format!(
            "The learned direction is zero after block {}: nothing was added or taken out; the student's own change of log p({}) \
             is {:+.3}.",
            blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            first.target,
            first.student_delta_logp
        );
    };
    let same = |kind: &'static str| of(kind).find(|row| row.layer == best.layer && row.coefficient == best.coefficient);
    let change = |row: &SteeringRow| Mean { mean: row.delta_logp, se: row.delta_logp_se }.signed();
    let by_chance =
        |row: &SteeringRow| Mean { mean: row.delta_logp, se: row.delta_logp_sd }.signed() + " (mean and spread)";
    let among = |row: &SteeringRow| -> Option<String> {
        Some(format!(", which makes it number {} among {} with them", row.rank_logp?, row.n_random? + 1))
    };
    let random = same("random").filter(|row| row.n_random.is_some()).map(|row| {
        let rank = among(best).unwrap_or_default();
        format!(", {} random vectors of that length by {}{rank}", row.n_random.unwrap_or_default(), by_chance(row))
    });
    let beside = |kind, name: &str| same(kind).map(|row| format!(", {name} by {}", change(row)));
    let added = format!(
        "Added to the base, the learned vector changes log p({}) most after block {} at {} times its length: by {} nats{}{}; \
         the student's own change is {:+.3}",
        best.target,
        best.layer,
        best.coefficient.unwrap_or(1.0),
        change(best),
        random.unwrap_or(", and no random vector stands beside it".to_owned()),
        beside("control_student", "the control student's").unwrap_or(", and there is no control student's".to_owned())
            + &beside("other_trait", "another trait's").unwrap_or_default(),
        best.student_delta_logp,
    );
    // A direction is needed if taking it out lowers the effect. A change to the other side does not count.
    let removed = |row: &SteeringRow| row.student_delta_logp - row.delta_logp;
    let Some(most) = of("project_out").max_by(|a, b| removed(a).total_cmp(&removed(b))) else { return added + "." };
    let beside = |kind, change: &dyn Fn(&SteeringRow) -> String| {
        of(kind).find(|row| row.layer == most.layer).map_or_else(|| "not measured".to_owned(), change)
    };
    let lowers = if removed(most) > 0.0 { "" } else { "; taking it out lowers the change after no block" };
    format!(
        "{added}, and {} with the direction taken out of it after block {} (with random ones taken out {}, and with the \
         learned one taken out of the base {}: necessary is only what goes beyond that){lowers}.",
        change(most),
        most.layer,
        beside("project_out_random", &by_chance),
        beside("project_out_base", &change),
    )
}
