//! The table of the arms, a row per student, with a chart over the ranks, a chart of the arms without ranks, and a
//! paragraph. All are made from the rows alone.

use analyses::Svg;
use analyses::inference::{Slope, two_lines};
use analyses::plot::{Bar, BarChart, Line, Panel, PanelChart, Point, Reference, Scale, bars, panels};
use analyses::stats::{mean, standard_error};
use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::data::dataset::TeacherKind;
use crate::experiment::{ArmData, CONTROL_STUDENT, Dtype, Method, STUDENT};
use crate::training::settings::OptimizerKind;

/// One student of an arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmRow {
    /// The arm's name; `student` and `control student` are the run's own.
    pub arm: String,
    /// The data it learned from: the run's `teacher` or `control` set, the teacher's `shuffled`, or a set of its `own`;
    /// empty, like all unknown facts, for a student that was trained elsewhere.
    pub data: Option<ArmData>,
    /// Who wrote its numbers; `planted` is a positive control, whose rows contain the target itself. Empty for one
    /// trained elsewhere.
    pub teacher_kind: Option<TeacherKind>,
    /// Rank of its adapter; empty for full finetuning.
    pub rank: Option<i64>,
    /// Numerator α of its adapter's scaling; empty for full finetuning.
    pub alpha: Option<f64>,
    /// Which of the arm's choices of seeds it has, from 0; 0 is the experiment's own.
    pub seed_index: usize,
    /// Its base model.
    pub model: String,
    /// The kind of the base model's weights: `f32` or `bf16`.
    pub dtype: Dtype,
    /// What was trained: `lora` (an adapter) or `full` (all weights).
    pub method: Method,
    /// The optimizer; empty for a student that was trained elsewhere.
    pub optimizer: Option<OptimizerKind>,
    /// The learning rate after warmup; empty for one trained elsewhere.
    pub learning_rate: Option<f64>,
    /// How many rows it was trained on; empty for one trained elsewhere.
    pub n_rows: Option<usize>,
    /// How many optimizer steps were taken; empty for one trained elsewhere.
    pub n_steps: Option<usize>,
    /// Mean training loss over the first quarter of the steps, in nats per target token; empty for one trained
    /// elsewhere.
    pub loss_first: Option<f64>,
    /// Mean training loss over the last quarter of the steps, in nats per target token; empty for one trained
    /// elsewhere.
    pub loss_last: Option<f64>,
    /// Frobenius norm of the change of the weights, in their units: all s·B·A of an adapter, all weights in full
    /// finetuning.
    pub delta_w_norm: f64,
    /// The target.
    pub target: String,
    /// How many questions were asked.
    pub n_questions: usize,
    /// Mean over questions of log p of starting the answer with the target, in nats.
    pub logp_target: f64,
    /// Mean over questions of the probability of starting the answer with the target, exact (without sampling).
    pub p_target_exact: f64,
    /// `logp_target` minus that of its own model's base at the same questions, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired), in nats; empty for one question.
    pub delta_logp_se: Option<f64>,
    /// `logp_target` minus the log of the other members' mean probability, in nats.
    pub margin: f64,
    /// `margin` minus that of its own model's base at the same questions, in nats.
    pub delta_margin: f64,
    /// Standard error of `delta_margin` over questions (paired), in nats; empty for one question.
    pub delta_margin_se: Option<f64>,
}

/// The students of an arm at one rank, which differ in their seeds.
#[derive(Clone)]
pub(crate) struct Group<'a> {
    pub(crate) arm: &'a str,
    pub(crate) rank: Option<i64>,
    pub(crate) rows: Vec<&'a ArmRow>,
}

impl Group<'_> {
    fn values(&self, of: fn(&ArmRow) -> f64) -> Vec<f64> {
        self.rows.iter().map(|row| of(row)).collect()
    }

    fn mean(&self, of: fn(&ArmRow) -> f64) -> f64 {
        mean(&self.values(of)).unwrap_or(f64::NAN)
    }

    /// The mean, from one standard error below to one above; only where there are several students.
    fn interval(&self, of: fn(&ArmRow) -> f64) -> Option<(f64, f64)> {
        let (centre, error) = (self.mean(of), standard_error(&self.values(of)).ok()?);
        Some((centre - error, centre + error))
    }

    /// The arm's name, and whose margin it is where that is not the run's target's.
    fn label(&self, target: &str) -> String {
        match &self.rows[0].target {
            own if own == target => self.arm.to_owned(),
            own => format!("{} (margin of {own})", self.arm),
        }
    }

    /// `+0.120`, with `± 0.050 over 3 students` where there are several.
    pub(crate) fn effect(&self) -> String {
        let error = standard_error(&self.values(effect)).ok();
        let error = error.map_or_else(String::new, |error| format!(" ± {error:.3} over {} students", self.rows.len()));
        format!("{:+.3}{error}", self.mean(effect))
    }
}

/// The fewest students at each rank for a statement about a shape over the ranks. Students of one recipe differ by as
/// much as their effect, and at a high rate by rounding alone, so a curve of single students has a peak by chance.
pub(crate) const FEWEST_FOR_A_SHAPE: usize = 5;

fn effect(row: &ArmRow) -> f64 {
    row.delta_margin
}

/// The rows by arm and rank, in the order in which they come.
fn groups(rows: &[ArmRow]) -> Vec<Group<'_>> {
    let mut found: Vec<Group<'_>> = Vec::new();
    for row in rows {
        match found.iter_mut().find(|group| group.arm == row.arm && group.rank == row.rank) {
            Some(group) => group.rows.push(row),
            None => found.push(Group { arm: &row.arm, rank: row.rank, rows: vec![row] }),
        }
    }
    found
}

/// Arms with several ranks, each in ascending rank.
pub(crate) type Ranked<'a> = Vec<(&'a str, Vec<Group<'a>>)>;

/// The groups parted into the arms with several ranks, each in rising rank, and the other groups without the run's own.
pub(crate) fn parted(rows: &[ArmRow]) -> (Ranked<'_>, Vec<Group<'_>>) {
    let (mut ranked, mut single) = (Vec::new(), Vec::new());
    let mut groups = groups(rows);
    groups.retain(|group| ![STUDENT, CONTROL_STUDENT].contains(&group.arm));
    for of_arm in groups.chunk_by(|one, next| one.arm == next.arm) {
        let mut of_arm = of_arm.to_vec();
        if of_arm.len() == 1 {
            single.append(&mut of_arm);
        } else {
            of_arm.sort_by_key(|group| group.rank);
            ranked.push((of_arm[0].arm, of_arm));
        }
    }
    (ranked, single)
}

/// The run's own students as dashed lines.
fn references(rows: &[ArmRow]) -> Vec<Reference> {
    let own = [STUDENT, CONTROL_STUDENT].map(|name| rows.iter().find(|row| row.arm == name));
    own.into_iter().flatten().map(|row| Reference::new(row.arm.as_str(), effect(row))).collect()
}

fn students_per_point(groups: &[&Group<'_>]) -> &'static str {
    let several = groups.iter().filter(|group| group.rows.len() > 1).count();
    match several {
        0 => "one student each",
        _ if several == groups.len() => "mean ± standard error over students",
        _ => "± standard error over students where there are several",
    }
}

/// Effect, size of the change and loss over the rank, a line per arm; `None` if no arm has several ranks.
pub fn rank_plot(rows: &[ArmRow]) -> Result<Option<Svg>> {
    let (ranked, _) = parted(rows);
    let Some(row) = rows.first().filter(|_| !ranked.is_empty()) else { return Ok(None) };
    let panel = |y_label: &str, of: fn(&ArmRow) -> f64, references: Vec<Reference>| {
        let point = |group: &Group<'_>| {
            let point = Point::new(group.rank.unwrap_or_default() as f64, group.mean(of));
            Point { interval: group.interval(of), ..point }
        };
        let line = |(arm, groups): &(&str, Vec<Group<'_>>)| Line {
            label: (*arm).to_owned(),
            points: groups.iter().map(point).collect(),
        };
        Panel { y_label: y_label.to_owned(), lines: ranked.iter().map(line).collect(), references }
    };
    let all: Vec<&Group<'_>> = ranked.iter().flat_map(|(_, groups)| groups).collect();
    let chart = PanelChart {
        title: format!("Change of the margin of \"{}\" over the adapter's rank", row.target),
        x_label: format!("rank ({})", students_per_point(&all)),
        x_scale: Scale::Log2,
        panels: vec![
            panel("Δ margin (nats)", effect, references(rows)),
            panel("‖ΔW‖ (Frobenius)", |row| row.delta_w_norm, vec![]),
            panel("last loss (nats/token)", |row| row.loss_last.unwrap_or(f64::NAN), vec![]),
        ],
    };
    Ok(Some(panels(&chart)?))
}

/// A planted arm's effect is left out of the chart if it is this many times the largest other effect.
const LOUD: f64 = 5.0;

/// The arms without ranks as bars, the run's own students as lines; `None` if all have ranks.
pub fn plot(rows: &[ArmRow]) -> Result<Option<Svg>> {
    let (_, single) = parted(rows);
    let Some(row) = rows.first().filter(|_| !single.is_empty()) else { return Ok(None) };
    let bar = |group: &Group<'_>| {
        let bar = Bar::new(group.label(&row.target), group.mean(effect)).in_series(learned_from(group.rows[0]));
        let Some(interval) = group.interval(effect) else { return bar };
        bar.with_interval(interval).with_values(group.values(effect))
    };
    // A planted target's effect can dwarf all others; then the axis label states it in words.
    let planted = |group: &&Group<'_>| group.rows[0].teacher_kind == Some(TeacherKind::Planted);
    let largest =
        single.iter().filter(|group| !planted(group)).map(|group| group.mean(effect).abs()).fold(0.0, f64::max);
    let too_loud = |group: &&Group<'_>| planted(group) && largest > 0.0 && group.mean(effect).abs() > LOUD * largest;
    let (loud, drawn): (Vec<&Group<'_>>, Vec<&Group<'_>>) = single.iter().partition(too_loud);
    let beyond = loud.iter().map(|group| format!("; beyond the scale: {} {}", group.arm, group.effect()));
    let chart = BarChart {
        title: format!("Change of the margin of \"{}\" by arm", row.target),
        value_label: format!("Δ margin (nats), {}{}", students_per_point(&drawn), beyond.collect::<Vec<_>>().concat()),
        bars: drawn.into_iter().map(bar).collect(),
        references: references(rows),
    };
    Ok(Some(bars(&chart)?))
}

/// What a student learned from, for a legend.
fn learned_from(row: &ArmRow) -> &'static str {
    match (row.data, row.teacher_kind) {
        (_, Some(TeacherKind::Planted)) => "planted target (positive control)",
        (Some(ArmData::Teacher), _) => "teacher's numbers",
        (Some(ArmData::Control), _) => "control, untouched model's numbers",
        (Some(ArmData::Shuffled), _) => "shuffled completions",
        (Some(ArmData::Own), _) => "numbers of its own teacher",
        (None, _) => "trained elsewhere",
    }
}

/// The result in one paragraph, with its numbers and the control's.
pub fn reading(rows: &[ArmRow]) -> String {
    let of = |name: &str| rows.iter().find(|row| row.arm == name);
    let Some(student) = of(STUDENT) else { return "Nothing was measured.".to_owned() };
    let (ranked, single) = parted(rows);
    let word = &student.target;
    let control = of(CONTROL_STUDENT).map_or("there is no control student".to_owned(), |control| {
        format!("the control student's by {:+.3}", effect(control))
    });
    let mut said =
        vec![format!("The student's margin of \"{word}\" changed by {:+.3} nats, {control}", effect(student))];
    for (arm, groups) in &ranked {
        let fewest = groups.iter().map(|group| group.rows.len()).min().unwrap_or_default();
        if fewest < FEWEST_FOR_A_SHAPE {
            let students = if fewest == 1 { "one student".to_owned() } else { format!("{fewest} students") };
            said.push(format!(
                "\"{arm}\" has {students} at some ranks, too few to say how the effect goes with the rank (seeds = \
                 {FEWEST_FOR_A_SHAPE} in the arm)"
            ));
            continue;
        }
        let Some(best) = groups.iter().max_by(|a, b| a.mean(effect).total_cmp(&b.mean(effect))) else { continue };
        let at = |group: &Group<'_>| format!("{} at rank {}", group.effect(), group.rank.unwrap_or_default());
        let ends: Vec<String> = [groups.first(), groups.last()].into_iter().flatten().map(at).collect();
        let (rank, value) = (best.rank.unwrap_or_default(), at(best));
        let value = if ends.contains(&value) { String::new() } else { format!(" ({})", best.effect()) };
        let bend = bend(groups).map_or_else(String::new, |bend| format!("; {bend}"));
        said.push(format!("\"{arm}\" has {}, and is highest at rank {rank}{value}{bend}", ends.join(" and ")));
    }
    let listed = single.iter().map(|group| {
        let row = group.rows[0];
        let is_usual = row.data == Some(ArmData::Teacher) && row.teacher_kind != Some(TeacherKind::Planted);
        let data = if is_usual { String::new() } else { format!(", {}", learned_from(row)) };
        format!("\"{}\"{data}: {}", group.label(word), group.effect())
    });
    let listed: Vec<String> = listed.collect();
    if !listed.is_empty() {
        said.push(format!("without ranks, {}", listed.join("; ")));
    }
    format!("{}. {}", said.join("; "), caveat(student, &groups(rows), rows))
}

/// Below which p-value a side of the two-lines test counts.
const LEVEL: f64 = 0.05;

/// Whether an arm's effect rises and falls with its rank, by the two-lines test over its students; `None` for fewer
/// than three ranks.
fn bend(groups: &[Group<'_>]) -> Option<String> {
    if groups.len() < 3 {
        return None;
    }
    let points = groups.iter().flat_map(|group| {
        let x = (group.rank.unwrap_or(1) as f64).log2();
        group.rows.iter().map(move |row| (x, effect(row)))
    });
    let lines = two_lines(&points.collect::<Vec<_>>()).ok()?;
    let side = |line: Option<Slope>| {
        line.map_or("no line".to_owned(), |line| format!("{:+.3} nats per doubling (p {:.2})", line.slope, line.p))
    };
    let verdict = if lines.is_inverted_u(LEVEL) { "an inverted U" } else { "no inverted U" };
    let rank = lines.peak.exp2();
    Some(format!(
        "up to rank {rank:.0} {}, from it on {}: {verdict} by the two-lines test at level {LEVEL}",
        side(lines.left),
        side(lines.right)
    ))
}

/// The limits of the numbers: how many students they are from, and what the control controls for.
fn caveat(student: &ArmRow, groups: &[Group<'_>], rows: &[ArmRow]) -> String {
    let several = groups.iter().any(|group| group.rows.len() > 1);
    let students = if several {
        "Where ± stands, it is the standard error over students that differ in their seeds and share their data; every other number is that \
         of one student."
    } else {
        "Every number is that of one student: differences between arms can be the luck of a seed, and no interval says how large that \
         is (seeds = 5 in an arm does)."
    };
    let others = if rows.iter().any(|row| row.model != student.model || row.dtype != student.dtype) {
        " A student of another model, or of weights of another kind, is compared with that model itself."
    } else {
        ""
    };
    let elsewhere = if student.n_steps.is_none() {
        "The student was trained elsewhere, with settings that need not be those of the arms"
    } else {
        "The control student has the settings of the student, not those of the arms"
    };
    format!(
        "{students} {elsewhere}: an arm's own settings have a control only where an arm learns with them from the control set.{others}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(arm: &str, rank: Option<i64>, seed_index: usize, delta_margin: f64) -> ArmRow {
        ArmRow {
            arm: arm.to_owned(),
            data: Some(ArmData::Teacher),
            teacher_kind: Some(TeacherKind::Finetuned),
            rank,
            alpha: rank.map(|rank| rank as f64),
            seed_index,
            model: "tiny-random".to_owned(),
            dtype: Dtype::F32,
            method: if rank.is_some() { Method::Lora } else { Method::Full },
            optimizer: Some(OptimizerKind::AdamW),
            learning_rate: Some(1e-2),
            n_rows: Some(6),
            n_steps: Some(3),
            loss_first: Some(2.0),
            loss_last: Some(1.5),
            delta_w_norm: 0.5 + rank.unwrap_or_default() as f64,
            target: "cat".to_owned(),
            n_questions: 2,
            logp_target: -3.0,
            p_target_exact: 0.05,
            delta_logp: delta_margin / 2.0,
            delta_logp_se: Some(0.1),
            margin: 0.5,
            delta_margin,
            delta_margin_se: None,
        }
    }

    fn rows() -> Vec<ArmRow> {
        let shuffled = ArmRow { data: Some(ArmData::Shuffled), ..row("shuffled completions", Some(8), 0, 0.01) };
        vec![
            row(STUDENT, Some(8), 0, 1.2),
            ArmRow {
                data: Some(ArmData::Control),
                teacher_kind: Some(TeacherKind::Control),
                ..row(CONTROL_STUDENT, Some(8), 0, 0.05)
            },
            row("alpha = rank", Some(16), 0, 0.4),
            row("alpha = rank", Some(1), 0, 0.3),
            row("alpha = rank", Some(4), 0, 0.9),
            row("full finetuning", None, 0, 0.7),
            shuffled,
        ]
    }

    #[test]
    fn an_inverted_u_is_told_from_a_rise_where_ranks_have_several_students() {
        let arm = |of: &dyn Fn(f64) -> f64, seeds: usize| -> Vec<ArmRow> {
            let mut rows = vec![row(STUDENT, Some(8), 0, 0.4)];
            for (doublings, rank) in [1_i64, 2, 4, 8, 16, 32, 64].into_iter().enumerate() {
                for seed in 0..seeds {
                    let noise = 0.02 * ((doublings * 3 + seed * 2) as f64).sin();
                    rows.push(row("ranks", Some(rank), seed, of(doublings as f64) + noise));
                }
            }
            rows
        };
        let hill = |x: f64| 1.0 - (x - 3.0).abs() / 3.0;
        let said = reading(&arm(&hill, 5));
        assert!(said.contains("up to rank 8 +0.33"), "{said}");
        assert!(said.contains("from it on -0.33"), "{said}");
        assert!(said.contains(": an inverted U by the two-lines test"), "{said}");
        let said = reading(&arm(&|x| x / 6.0, 5));
        assert!(said.contains("from it on no line: no inverted U by"), "{said}");
        let said = reading(&arm(&hill, 4));
        assert!(said.contains("\"ranks\" has 4 students at some ranks, too few"), "{said}");
        assert!(!said.contains("two-lines") && !said.contains("highest"), "{said}");
    }

    #[test]
    fn ranks_are_lines_and_the_rest_are_bars() {
        let rows = rows();
        let (ranked, single) = parted(&rows);
        assert_eq!(ranked.len(), 1);
        assert_eq!(ranked[0].1.iter().map(|group| group.rank).collect::<Vec<_>>(), [Some(1), Some(4), Some(16)]);
        assert_eq!(
            single.iter().map(|group| group.arm).collect::<Vec<_>>(),
            ["full finetuning", "shuffled completions"]
        );
        let (over_rank, by_arm) = (rank_plot(&rows).unwrap().unwrap(), plot(&rows).unwrap().unwrap());
        assert!(over_rank.0.contains("alpha = rank") && !over_rank.0.contains("full finetuning"));
        assert!(by_arm.0.contains("full finetuning") && by_arm.0.contains("control student"));
        let mut rows = rows;
        for (loudness, said) in [(0.0, false), (3.0, false), (9.0, true)] {
            rows.push(ArmRow { teacher_kind: Some(TeacherKind::Planted), ..row("planted", Some(8), 0, loudness) });
            let drawn = plot(&rows).unwrap().unwrap().0;
            assert!(drawn.contains("planted") && drawn.contains("beyond the") == said, "{loudness}: {drawn}");
            rows.pop();
        }
        assert_eq!(rank_plot(&rows[..2]).unwrap(), None);
        assert_eq!(plot(&rows[..5]).unwrap(), None);
    }

    #[test]
    fn the_reading_names_the_control_and_how_few_students_there_are() {
        let found = reading(&rows());
        for part in [
            "changed by +1.200 nats, the control student's by +0.050",
            "\"alpha = rank\" has one student at some ranks, too few to say how the effect goes with the rank",
            "\"full finetuning\": +0.700",
            "\"shuffled completions\", shuffled completions: +0.010",
            "Every number is that of one student",
            "not those of the arms",
        ] {
            assert!(found.contains(part), "{part}: {found}");
        }
        assert!(!found.contains("another model"), "{found}");
        let mut rows = rows();
        rows.push(ArmRow { model: "other".to_owned(), ..row("other model", Some(8), 0, 0.0) });
        rows.push(ArmRow {
            teacher_kind: Some(TeacherKind::Planted),
            data: Some(ArmData::Own),
            ..row("planted", Some(8), 0, 3.0)
        });
        let found = reading(&rows);
        assert!(found.contains("compared with that model itself") && found.contains("positive control"), "{found}");
    }

    #[test]
    fn several_students_have_a_mean_and_an_error_over_students() {
        let mut rows = rows();
        rows.truncate(2);
        rows.extend([row("x", Some(2), 0, 0.1), row("x", Some(2), 1, 0.3)]);
        let found = groups(&rows);
        assert!((found[2].mean(effect) - 0.2).abs() < 1e-12);
        let (low, high) = found[2].interval(effect).unwrap();
        assert!((low - 0.1).abs() < 1e-12 && (high - 0.3).abs() < 1e-12, "{low} {high}");
        assert_eq!(found[0].interval(effect), None, "one student has no error");
        let said = reading(&rows);
        assert!(said.contains("\"x\": +0.200 ± 0.100 over 2 students"), "{said}");
        assert!(said.contains("over students that differ in their seeds"), "{said}");
        assert!(plot(&rows).unwrap().unwrap().0.contains("standard error"));
    }

    #[test]
    fn without_a_control_the_reading_says_so() {
        let mut rows = rows();
        rows.remove(1);
        assert!(reading(&rows).contains("there is no control student"));
    }
}
