//! The student's change of the residual stream at number prompts: per layer the mean of student − base, its length, its
//! agreement over prompts, and its cosine with the teacher's. Layers count blocks from 0; the embedding is not one.

mod extraction;
pub(crate) mod geometry;

use hooks::{Sequence, resid_post};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use extraction::Extraction;

use crate::Analysis;
use crate::direction::geometry::{cosine, first_share, length, principal_share};
use crate::error::{Error, Result};
use crate::plot::{Line, LineChart, Point, Reference, Svg, lines};
use crate::subject::{Subject, Tuned};

/// Settings of the learned direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Direction {
    /// The positions of a prompt at which the residual stream is read. Steering and the export use the first.
    pub positions: Vec<Extraction>,
    /// Number of number prompts that the means are over.
    pub n_prompts: usize,
}

impl Default for Direction {
    fn default() -> Self {
        Self { positions: vec![Extraction::All, Extraction::Last], n_prompts: 32 }
    }
}

/// Reads a column of the table.
type Column = fn(&DirectionRow) -> Option<f64>;

/// The learned direction of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DirectionRow {
    /// The positions of a prompt at which the residual stream is read: `all`, `last` or `class:CLASS[+CLASS]`.
    pub positions: String,
    /// The block, from 0; the residual stream after it is read.
    pub layer: usize,
    /// Number of number prompts that the means are over.
    pub n_prompts: usize,
    /// Length of the mean of student − base, in units of the residual stream: the mean over prompts of each prompt's
    /// mean over its positions (one position at `last`).
    pub norm: f64,
    /// Mean length of the base's residual stream at the same positions, in its units: the lengths at single positions,
    /// averaged over each prompt's positions and then over prompts.
    pub resid_norm: f64,
    /// `norm` over `resid_norm`, without a unit.
    pub relative_norm: f64,
    /// Share of the largest squared singular value in the sum of all, of the uncentred differences (one row per
    /// prompt): 1 if all prompts move along one line, 0 if none moves.
    pub ev1: f64,
    /// Share of the first principal component in the differences' variance around their mean: the share of the
    /// variation between prompts that is along one line. Empty with fewer than three prompts.
    pub pc1: Option<f64>,
    /// Cosine between the means over the even and over the odd prompts; empty with one prompt.
    pub split_half_cosine: Option<f64>,
    /// Length of the teacher's direction (teacher in its context − base in the student's), in units of the residual
    /// stream; empty without a teacher.
    pub teacher_norm: Option<f64>,
    /// Cosine with the teacher's direction, −1 to 1; empty without a teacher.
    pub cos_teacher: Option<f64>,
    /// Length of the control student's direction, in units of the residual stream; empty without one.
    pub control_norm: Option<f64>,
    /// Cosine with the control student's direction, −1 to 1: the effect of learning any numbers; empty without one.
    pub cos_control: Option<f64>,
    /// Cosine of the control student's direction with the teacher's, −1 to 1; empty without either.
    pub cos_control_teacher: Option<f64>,
    /// Typical size of the cosine of two unrelated directions, `1/√d_model`.
    pub cos_chance: f64,
}

impl Analysis for Direction {
    type Row = DirectionRow;
    const NAME: &'static str = "direction";
    const QUESTION: &'static str = "Which direction did the student learn at each layer, and is it the teacher's?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<DirectionRow>> {
        let mut read = |who: &str, model: Tuned<'_>| {
            progress(&format!("direction: residual stream of the {who} at number prompts"));
            self.read(subject, model)
        };
        let (base, student) = (read("base", subject.base())?, read("student", subject.student)?);
        let control = subject.control.map(|control| read("control", control)).transpose()?;
        let teacher = self.read_teacher(subject)?;
        table(&student, &base, teacher.as_ref(), control.as_ref())
    }

    fn plot(rows: &[DirectionRow]) -> Result<Option<Svg>> {
        let Some(first) = rows.first() else { return Ok(None) };
        let with_teacher = rows.iter().any(|row| row.cos_teacher.is_some());
        let columns: &[(&str, Column)] = if with_teacher {
            &[("student", |row| row.cos_teacher), ("control", |row| row.cos_control_teacher)]
        } else {
            &[("student", |row| Some(row.relative_norm))]
        };
        let mut choices: Vec<&str> = rows.iter().map(|row| row.positions.as_str()).collect();
        choices.dedup();
        let mut found = Vec::new();
        for (name, value) in columns {
            for positions in &choices {
                let of = rows.iter().filter(|row| row.positions == *positions);
                let points: Vec<Point> = of.filter_map(|row| Some(Point::new(row.layer as f64, value(row)?))).collect();
                if !points.is_empty() {
                    found.push(Line { label: format!("{name}, {positions}"), points });
                }
            }
        }
        let cosines = "Cosine of the learned direction with the teacher's";
        let title = if with_teacher { cosines } else { "Length of the learned direction" };
        let chance = [Reference::new("chance", first.cos_chance), Reference::new("chance", -first.cos_chance)];
        let chart = LineChart {
            title: title.to_owned(),
            x_label: "block".to_owned(),
            y_label: if with_teacher { "cosine" } else { "share of the residual stream's length" }.to_owned(),
            lines: found,
            references: if with_teacher { chance.into() } else { Vec::new() },
            ..LineChart::default()
        };
        Ok(Some(lines(&chart)?))
    }

    fn reading(rows: &[DirectionRow]) -> String {
        let Some(widest) = rows.iter().max_by(|a, b| a.relative_norm.total_cmp(&b.relative_norm)) else {
            return "Nothing was measured.".to_owned();
        };
        let percent = 100.0 * widest.relative_norm;
        let moved = format!(
            "The student moves the residual stream most, by {percent:.2} % of its length, after block {} (positions: {}); \
             {:.0} % of the squared movement there lies along one line",
            widest.layer,
            widest.positions,
            100.0 * widest.ev1,
        );
        let strongest = rows.iter().filter(|row| row.cos_teacher.is_some());
        let strongest =
            strongest.max_by(|a, b| a.cos_teacher.unwrap_or_default().total_cmp(&b.cos_teacher.unwrap_or_default()));
        let Some((row, cosine)) = strongest.and_then(|row| Some((row, row.cos_teacher?))) else {
            return format!("{moved}; there is no teacher to compare with.");
        };
        let control = match (row.cos_control_teacher, row.cos_control) {
            (Some(teacher), Some(student)) => {
                format!(", where the control student's is {teacher:+.2}, and {student:+.2} with the student's")
            }
            _ => "; there is no control student to set against it".to_owned(),
        };
        format!(
            "{moved}; the largest cosine with the teacher's direction is {cosine:+.2} after block {} ({}), chance being ±{:.2}{control}.",
            row.layer, row.positions, row.cos_chance
        )
    }
}

/// The mean residual stream of a model at each number prompt, read once for several analyses or students.
#[derive(Debug)]
pub struct Means {
    by_choice: Vec<(Extraction, Option<Read>)>,
}

/// The residual streams at one choice of positions, which all prompts have.
#[derive(Debug)]
struct Read {
    /// The mean over the positions of each prompt, `[n_prompts, n_layers, d_model]`, f32 on the CPU.
    resid: Tensor,
    /// The length at single positions, as a mean over the positions of each prompt, `[n_prompts, n_layers]`, f64.
    lengths: Tensor,
}

impl Means {
    /// Reads each prompt at each choice of positions; a choice that a prompt lacks gives `None`. Runs some prompts at a
    /// time, since all positions of all layers take much memory.
    fn of(model: Tuned<'_>, prompts: &[Sequence], positions: &[Extraction]) -> Result<Self> {
        let mut found: Vec<Vec<(Tensor, Tensor)>> = positions.iter().map(|_| Vec::new()).collect();
        for prompts in prompts.chunks(PROMPTS) {
            for (prompt, resid) in prompts.iter().zip(resid_post(model.qwen, prompts, &model.condition())?) {
                for (found, positions) in found.iter_mut().zip(positions) {
                    found.extend(positions.mean(&resid, prompt)?);
                }
            }
        }
        let stacked = |(positions, found): (&Extraction, Vec<(Tensor, Tensor)>)| -> Result<_> {
            if found.len() < prompts.len() {
                return Ok((positions.clone(), None));
            }
            let (resid, lengths): (Vec<Tensor>, Vec<Tensor>) = found.into_iter().unzip();
            let read = Read { resid: Tensor::f_stack(&resid, 0)?, lengths: Tensor::f_stack(&lengths, 0)? };
            Ok((positions.clone(), Some(read)))
        };
        Ok(Self { by_choice: positions.iter().zip(found).map(stacked).collect::<Result<_>>()? })
    }

    fn get(&self, at: usize) -> Result<&Read> {
        let (positions, means) = &self.by_choice[at];
        means.as_ref().ok_or_else(|| unselected(positions))
    }

    /// The mean of this model − base at the first choice of positions, `[d_model]` for each block.
    pub fn direction(&self, base: &Self) -> Result<Vec<Tensor>> {
        // [n_layers, d_model]
        let mean = self.get(0)?.resid.f_sub(&base.get(0)?.resid)?.f_mean_dim(0, false, Kind::Float)?;
        (0..mean.size()[0]).map(|layer| Ok(mean.f_get(layer)?)).collect()
    }
}

impl Direction {
    /// Refuses positions that one of these number prompts lacks, before anything is trained.
    pub fn check(&self, prompts: &[Sequence]) -> Result<()> {
        let lacks = |positions: &&Extraction| !prompts.iter().all(|prompt| positions.is_in(prompt));
        self.positions.iter().find(lacks).map_or(Ok(()), |positions| Err(unselected(positions)))
    }

    /// Reads the residual stream of a model in the student's context.
    pub fn read(&self, subject: &Subject<'_>, model: Tuned<'_>) -> Result<Means> {
        Means::of(model, &self.prompts(subject)?, &self.positions)
    }

    /// Reads the residual stream of the teacher in its own context; `None` without a teacher.
    pub fn read_teacher(&self, subject: &Subject<'_>) -> Result<Option<Means>> {
        let Some((teacher, system)) = subject.teacher() else { return Ok(None) };
        let prompt = |row: usize| Ok(subject.chat.prompt(system, &subject.number_user(row)?.0)?);
        let prompts = (0..self.prompts(subject)?.len()).map(prompt).collect::<Result<Vec<_>>>()?;
        Means::of(teacher, &prompts, &self.positions).map(Some)
    }

    fn prompts(&self, subject: &Subject<'_>) -> Result<Vec<Sequence>> {
        if self.n_prompts == 0 || self.positions.is_empty() {
            let setting = if self.n_prompts == 0 { "n_prompts" } else { "positions" };
            return Err(Error::setting(Self::NAME, setting, "at least one", &"none"));
        }
        subject.number_prompts(Self::NAME, self.n_prompts)
    }
}

/// The table, from means that were read with these settings.
pub fn table(
    student: &Means,
    base: &Means,
    teacher: Option<&Means>,
    control: Option<&Means>,
) -> Result<Vec<DirectionRow>> {
    let mut rows = Vec::new();
    for (at, (positions, _)) in student.by_choice.iter().enumerate() {
        let base = base.get(at)?;
        let moved = |means: Option<&Means>| -> Result<Option<Tensor>> {
            let means = means.and_then(|means| means.by_choice[at].1.as_ref());
            Ok(means.map(|means| means.resid.f_sub(&base.resid)).transpose()?)
        };
        let (student, teacher, control) =
            (student.get(at)?.resid.f_sub(&base.resid)?, moved(teacher)?, moved(control)?);
        for layer in 0..student.size3()?.1 as usize {
            rows.push(row(positions, layer, &student, base, teacher.as_ref(), control.as_ref())?);
        }
    }
    Ok(rows)
}

/// The student's learned direction of every layer, each `[d_model]`, f32 on the CPU, with its length: the mean of
/// student − base over number prompts, at the first of the settings' positions.
pub fn directions(subject: &Subject<'_>, settings: &Direction) -> Result<Vec<Tensor>> {
    let first = Direction { positions: settings.positions.iter().take(1).cloned().collect(), ..settings.clone() };
    first.read(subject, subject.student)?.direction(&first.read(subject, subject.base())?)
}

fn unselected(positions: &Extraction) -> Error {
    Error::setting(Direction::NAME, "positions", "positions that every number prompt has", positions)
}

/// Number of prompts whose residual streams are held at a time.
const PROMPTS: usize = 32;

fn row(
    positions: &Extraction,
    layer: usize,
    student: &Tensor, // minus the base, [n_prompts, n_layers, d_model], like the others
    base: &Read,
    teacher: Option<&Tensor>,
    control: Option<&Tensor>,
) -> Result<DirectionRow> {
    let of_layer = |all: &Tensor| all.f_select(1, layer as i64)?.f_to_kind(Kind::Double); // [n_prompts, d_model]
    let mean = |all: &Tensor| of_layer(all)?.f_mean_dim(0, false, Kind::Double);
    let moved = of_layer(student)?;
    let (n_prompts, d_model) = moved.size2()?;
    let vector = moved.f_mean_dim(0, false, Kind::Double)?;
    let teacher = teacher.map(mean).transpose()?;
    let control = control.map(mean).transpose()?;
    let half = |from: i64| moved.f_slice(0, from, n_prompts, 2)?.f_mean_dim(0, false, Kind::Double);
    let norm = length(&vector)?;
    let resid_norm = base.lengths.f_select(1, layer as i64)?.f_mean(Kind::Double)?.f_double_value(&[])?;
    let with = |other: Option<&Tensor>| other.map(|other| cosine(&vector, other)).transpose();
    Ok(DirectionRow {
        positions: positions.to_string(),
        layer,
        n_prompts: n_prompts as usize,
        norm,
        resid_norm,
        relative_norm: norm / resid_norm,
        ev1: first_share(&moved)?,
        pc1: principal_share(&moved)?,
        split_half_cosine: (n_prompts > 1).then(|| cosine(&half(0)?, &half(1)?)).transpose()?,
        teacher_norm: teacher.as_ref().map(length).transpose()?,
        cos_teacher: with(teacher.as_ref())?,
        control_norm: control.as_ref().map(length).transpose()?,
        cos_control: with(control.as_ref())?,
        cos_control_teacher: control.as_ref().zip(teacher.as_ref()).map(|(a, b)| cosine(a, b)).transpose()?,
        cos_chance: 1.0 / (d_model as f64).sqrt(),
    })
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use hooks::Selection;

    use super::*;
    use crate::fixture::World;

    #[test]
    fn the_direction_is_the_mean_of_the_differences() {
        let world = World::new();
        let subject = world.subject();
        let settings = Direction {
            positions: vec![Extraction::Last, Extraction::All, "class:user".parse().unwrap()],
            n_prompts: 2,
        };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        assert_eq!(rows.len(), 3 * world.qwen.config.n_layers);

        // By hand, at the last token of two prompts.
        let last = |condition| {
            let prompts = subject.number_prompts("test", 2).unwrap();
            let resid = resid_post(&world.qwen, &prompts, &condition).unwrap();
            let last: Vec<Tensor> = resid.iter().map(|resid| resid.select(1, -1)).collect(); // [n_layers, d_model]
            (&last[0] + &last[1]) / 2.0
        };
        let by_hand = last(subject.student.condition()) - last(subject.base().condition());
        let found = directions(&subject, &settings).unwrap();
        for (layer, found) in found.iter().enumerate() {
            assert!((found - by_hand.get(layer as i64)).abs().max().double_value(&[]) < 1e-5);
            assert!((rows[layer].norm - length(found).unwrap()).abs() < 1e-5 && rows[layer].norm > 0.0);
            assert!(rows[layer].cos_teacher.unwrap().abs() <= 1.0 && rows[layer].cos_control.unwrap() < 0.999);
        }
        let reading = Direction::reading(&rows);
        let widest = rows.iter().max_by(|a, b| a.relative_norm.total_cmp(&b.relative_norm)).unwrap();
        let (share, along) = (100.0 * widest.relative_norm, 100.0 * widest.ev1);
        assert!(reading.contains(&format!("by {share:.2} % of its length")), "{reading}");
        assert!(
            reading.contains(&format!("{along:.0} % of the squared movement")) && reading.ends_with('.'),
            "{reading}"
        );
        // Chance is a line on both sides of zero; two names of one line would be written one below the other.
        let svg = Direction::plot(&rows).unwrap().unwrap().0;
        let names = svg
            .split("<text ")
            .filter(|rest| rest.split_once('>').is_some_and(|(_, text)| text.trim_start().starts_with("chance")));
        let at: Vec<f64> =
            names.map(|rest| rest.split("y=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()).collect();
        assert!(at.len() == 2 && (at[0] - at[1]).abs() > 4.0 * 16.0, "{at:?}");
    }

    /// The column is the mean of lengths at single tokens, which is larger than the length of the mean.
    #[test]
    fn the_residual_streams_length_is_that_of_single_tokens() {
        let world = World::new();
        let subject = world.subject();
        let settings = Direction {
            positions: vec![Extraction::All, "class:user".parse().unwrap(), Extraction::Last],
            n_prompts: 3,
        };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        let prompts = subject.number_prompts("test", 3).unwrap();
        let resid = resid_post(&world.qwen, &prompts, &subject.base().condition()).unwrap();
        let user: Selection = "user".parse().unwrap();
        for row in &rows {
            let is_read = |prompt: &Sequence, at: usize| match row.positions.as_str() {
                "all" => true,
                "last" => at == prompt.ids.len() - 1,
                _ => user.contains(prompt.classes[at]),
            };
            let of_prompt = |(prompt, resid): (&Sequence, &Tensor)| {
                let places = (0..prompt.ids.len()).filter(|at| is_read(prompt, *at));
                let length = |at: usize| {
                    let vector: Vec<f32> = resid.get(row.layer as i64).get(at as i64).try_into().unwrap();
                    vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
                };
                crate::subject::mean(places.map(length)).unwrap()
            };
            let by_hand = crate::subject::mean(prompts.iter().zip(&resid).map(of_prompt)).unwrap();
            assert!((row.resid_norm - by_hand).abs() < 1e-4 * by_hand, "{row:?} {by_hand}");
            assert!((row.relative_norm - row.norm / by_hand).abs() < 1e-4 * row.relative_norm);
        }
        let resid_norm = |positions: &str| rows.iter().find(|row| row.positions == positions).unwrap().resid_norm;
        assert!(resid_norm("all") != resid_norm("last"));
    }

    #[test]
    fn a_student_that_is_the_teacher_has_its_direction() {
        let world = World::new();
        let mut subject = world.subject();
        (subject.teacher_system, subject.teacher_adapter) = (None, Some(&world.student));
        let settings = Direction { positions: vec![Extraction::All], n_prompts: 3 };
        let rows = settings.run(&subject, &mut |_| ()).unwrap();
        assert!(rows.iter().all(|row| (row.cos_teacher.unwrap() - 1.0).abs() < 1e-6));
        subject.teacher_adapter = None;
        assert!(settings.run(&subject, &mut |_| ()).unwrap().iter().all(|row| row.cos_teacher.is_none()));
        let nowhere = Direction { positions: vec!["class:gen".parse().unwrap()], n_prompts: 3 };
        assert!(nowhere.run(&subject, &mut |_| ()).unwrap_err().to_string().contains("class:gen"));
        for (n_prompts, positions, setting) in [(0, vec![Extraction::All], "n_prompts"), (3, vec![], "positions")] {
            let error = Direction { positions, n_prompts }.run(&subject, &mut |_| ()).unwrap_err().to_string();
            assert!(error.contains(setting), "{error}");
        }
    }
}
