//! The table of the arms, a row per student, with a chart over the ranks, a chart of the arms without ranks, and a
//! paragraph. Charts and paragraph are made from the rows.

use analyses::Svg;
use analyses::inference::{Slope, two_lines};
use analyses::plot::{Bar, BarChart, Line, Panel, PanelChart, Point, Reference, Scale, bars, panels};
use analyses::stats::{is_clear, mean, standard_error};
use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::data::dataset::TeacherKind;
use crate::experiment::{ArmData, CONTROL_STUDENT, Dtype, Method, STUDENT};
use crate::training::settings::{Loss, OptimizerKind};

/// One student of an arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmRow {
    /// The arm's name; `student` and `control student` are the run's own.
    pub arm: String,
    /// The data it learned from: the run's `teacher` or `control` set, the teacher's completions `shuffled` among
    /// prompts, a set of the arm's `own` teacher, or the control set with `planted` rows; empty if it was trained
    /// elsewhere.
    pub data: Option<ArmData>,
    /// The kind of model that wrote its numbers; `planted` is a positive control, whose rows contain the target itself;
    /// empty if it was trained elsewhere.
    pub teacher_kind: Option<TeacherKind>,
    /// Rank of its adapter; empty for full finetuning.
    pub rank: Option<i64>,
    /// Numerator α of its adapter's scaling; empty for full finetuning.
    pub alpha: Option<f64>,
    /// Index of its seeds, from 0; 0 has the experiment's seeds.
    pub seed_index: usize,
    /// Its base model.
    pub model: String,
    /// The dtype of the base model's weights: `f32` or `bf16`.
    pub dtype: Dtype,
    /// The trained weights: `lora` (an adapter) or `full` (all weights).
    pub method: Method,
    /// The optimizer; empty if it was trained elsewhere.
    pub optimizer: Option<OptimizerKind>,
    /// The learning rate after warmup; empty if it was trained elsewhere.
    pub learning_rate: Option<f64>,
    /// The loss of a token: `nll`, or `kl` from soft labels (logits on numbers); empty if it was trained elsewhere.
    pub loss: Option<Loss>,
    /// The kept rows that it learned from: `all`, `top` or `random` with a share; empty if it was trained elsewhere.
    pub select: Option<String>,
    /// Number of rows it was trained on; empty if it was trained elsewhere.
    pub n_rows: Option<usize>,
    /// Number of optimizer steps; empty if it was trained elsewhere.
    pub n_steps: Option<usize>,
    /// Mean training loss over the first quarter of the steps, in nats per target token; empty if it was trained
    /// elsewhere.
    pub loss_first: Option<f64>,
    /// Mean training loss over the last quarter of the steps, in nats per target token; empty if it was trained
    /// elsewhere.
    pub loss_last: Option<f64>,
    /// Frobenius norm of the change of the weights, in their units: all s·B·A of an adapter, all weights in full
    /// finetuning.
    pub delta_w_norm: f64,
    /// The target's word.
    pub target: String,
    /// Number of questions.
    pub n_questions: usize,
    /// Mean over questions of log p of starting the answer with the target, in nats.
    pub logp_target: f64,
    /// Mean over questions of the probability of starting the answer with the target, exact (without sampling), 0 to 1.
    pub p_target_exact: f64,
    /// `logp_target` minus that of its base at the same questions, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired), in nats; empty for one question.
    pub delta_logp_se: Option<f64>,
    /// `logp_target` minus the log of the other members' mean probability, in nats.
    pub margin: f64,
    /// `margin` minus that of its base at the same questions, in nats.
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

    /// The interval from one standard error below the mean to one above; `None` for a single student.
    fn interval(&self, of: fn(&ArmRow) -> f64) -> Option<(f64, f64)> {
        let (centre, error) = (self.mean(of), standard_error(&self.values(of)).ok()?);
        Some((centre - error, centre + error))
    }

    /// The arm's name, with its target if that is not the run's.
    fn label(&self, target: &str) -> String {
        match &self.rows[0].target {
            own if own == target => self.arm.to_owned(),
            own => format!("{} (margin of {own})", self.arm),
        }
    }

    /// The effect as text: `+0.120`, with `± 0.050 over 3 students` if there are several.
    pub(crate) fn effect(&self) -> String {
        let error = standard_error(&self.values(effect)).ok();
        let error = error.map_or_else(String::new, |error| format!(" ± {error:.3} over {} students", self.rows.len()));
        format!("{:+.3}{error}", self.mean(effect))
    }
}

/// The smallest number of students at each rank for a statement on the shape over ranks. Students of the same settings
/// differ by as much as their effect, and at a high learning rate by rounding alone. So a curve of single students has
/// a peak by chance.
pub(crate) const FEWEST_FOR_A_SHAPE: usize = 5;

fn effect(row: &ArmRow) -> f64 {
    row.delta_margin
}

/// Groups the rows by arm and rank, in their order.
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

/// Arms with several ranks, with their groups in ascending rank.
pub(crate) type Ranked<'a> = Vec<(&'a str, Vec<Group<'a>>)>;

/// Divides the groups into arms with several ranks, in ascending rank, and the others, without the run's own students.
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

/// A planted arm is left out of the chart if its effect is more than this many times the largest other one.
const LOUD: f64 = 5.0;

/// The arms without ranks as bars, with the run's own students as lines; `None` if all arms have ranks.
pub fn plot(rows: &[ArmRow]) -> Result<Option<Svg>> {
    let (_, single) = parted(rows);
    let Some(row) = rows.first().filter(|_| !single.is_empty()) else { return Ok(None) };
    let bar = |group: &Group<'_>| {
        let bar = Bar::new(group.label(&row.target), group.mean(effect)).in_series(learned_from(group.rows[0]));
        let Some(interval) = group.interval(effect) else { return bar };
        bar.with_interval(interval).with_values(group.values(effect))
    };
    // If a planted target's effect would dwarf all others, the axis label states it in words instead.
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

/// The data that a student learned from, for a legend.
fn learned_from(row: &ArmRow) -> &'static str {
    match (row.data, row.teacher_kind) {
        (_, Some(TeacherKind::Planted)) | (Some(ArmData::Planted), _) => "planted target (positive control)",
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
    let limit = detection_limit(rows).map_or(String::new(), |limit| format!(" {limit}."));
    format!("{}.{limit} {}", said.join("; "), caveat(student, &groups(rows), rows))
}

/// A sentence on the smallest planted share whose students differ clearly from the control student; `None` if no share
/// was planted among the control rows.
pub(crate) fn detection_limit(rows: &[ArmRow]) -> Option<String> {
    let control = rows.iter().find(|row| row.arm == CONTROL_STUDENT)?;
    let is_seen = |row: &&ArmRow| {
        let errors = [row.delta_margin_se, control.delta_margin_se].into_iter().flatten();
        let error = errors.map(|error| error * error).sum::<f64>().sqrt();
        is_clear(effect(row) - effect(control), Some(error))
    };
    let planted: Vec<&ArmRow> = rows.iter().filter(|row| row.data == Some(ArmData::Planted)).collect();
    let (seen, unseen): (Vec<&ArmRow>, Vec<&ArmRow>) = planted.iter().copied().partition(is_seen);
    let named = |rows: &[&ArmRow]| {
        let each = rows.iter().map(|row| format!("\"{}\" by {:+.3}", row.arm, effect(row) - effect(control)));
        each.collect::<Vec<_>>().join(", ")
    };
    let told = match (seen.is_empty(), unseen.is_empty()) {
        (true, true) => return None,
        (false, true) => format!("{} differ clearly", named(&seen)),
        (true, false) => format!("{} do not differ clearly, so that a null says nothing", named(&unseen)),
        (false, false) => format!("{} differ clearly, {} do not", named(&seen), named(&unseen)),
    };
    Some(format!(
        "What this experiment could have seen: of the students whose rows name the target in the open, {told} (nats of the \
         margin above the control student; three standard errors over questions)"
    ))
}

/// The p-value below which a side of the two-lines test counts.
const LEVEL: f64 = 0.05;

/// A phrase on whether an arm's effect rises and then falls with its rank, by the two-lines test over its students;
/// `None` for fewer than three ranks.
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

/// The sentences on the limits of the numbers: the number of students, and the settings of the control.
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
mod tests;
