//! The figures of a claim, drawn from the table of outcomes.

use std::collections::{BTreeMap, BTreeSet};

use analyses::Svg;
use analyses::plot::{Bar, BarChart, HeatMap, Line, Panel, PanelChart, Point, Reference, Scale, bars, heatmap, panels};
use analyses::stats::{mean, t_interval};
use anyhow::{Context, Result, ensure};

use super::estimate::LEVEL;
use super::file::{Claim, EVERYWHERE, Figure, FigureKind};
use super::outcome::{OutcomeRow, Quantity};
use super::tables::SpectrumRow;
use crate::experiment::STUDENT;

impl Figure {
    /// Draws the figure; an error if none of its numbers was measured.
    pub fn draw(&self, claim: &Claim, rows: &[OutcomeRow]) -> Result<Svg> {
        ensure!(!self.quantities.is_empty(), "figure {:?}: quantities is empty, expected at least one", self.title);
        let drawn = match self.kind {
            FigureKind::Bars => self.bars(claim, rows),
            FigureKind::Ranks | FigureKind::RanksByTrait => self.ranks(claim, rows),
            FigureKind::Heatmap => self.heatmap(rows),
            FigureKind::Matrix => self.matrix(claim, rows),
        };
        drawn.with_context(|| format!("figure {:?}", self.title))
    }

    /// The meaning of the figure's first quantity, as its question on the page.
    pub fn question(&self) -> String {
        self.quantities[0].meaning().to_owned()
    }

    /// The students and conditions, in the figure's order.
    fn order(&self, rows: &[OutcomeRow]) -> (Vec<String>, Vec<String>) {
        let seen = |of: fn(&OutcomeRow) -> &String| {
            let mut known = BTreeSet::new();
            let names = rows.iter().filter(|row| row.quantity == self.quantities[0]).map(of);
            names.filter(|name| known.insert(*name)).cloned().collect::<Vec<String>>()
        };
        let students = if self.students.is_empty() { seen(|row| &row.student) } else { self.students.clone() };
        let cells = if self.cells.is_empty() { seen(|row| &row.cell) } else { self.cells.clone() };
        (students, cells)
    }

    /// Each bar's label, its trait if each trait has bars, and the data sets' values.
    fn labelled(&self, claim: &Claim, rows: &[OutcomeRow]) -> Vec<(String, Option<String>, Vec<f64>)> {
        let (students, cells) = self.order(rows);
        let words = words(claim, self.by_trait);
        let several = |names: &[String]| names.len() > 1;
        let mut found = vec![];
        for (student, cell) in students.iter().flat_map(|student| cells.iter().map(move |cell| (student, cell))) {
            for word in &words {
                let by_rank = over_ranks(rows, self.quantities[0], (student, cell), *word);
                for (rank, values) in &by_rank {
                    let ranked =
                        rank.filter(|_| by_rank.len() > 1).map_or_else(String::new, |rank| format!(", rank {rank}"));
                    let label = match (several(&students), several(&cells)) {
                        (true, true) if cell != EVERYWHERE => format!("{student}{ranked}: {cell}"),
                        (false, true) => cell.clone(),
                        _ => format!("{student}{ranked}"),
                    };
                    found.push((label, word.map(str::to_owned), values.clone()));
                }
            }
        }
        found
    }

    fn bars(&self, claim: &Claim, rows: &[OutcomeRow]) -> Result<Svg> {
        let quantity = self.quantities[0];
        let mut drawn = vec![];
        for (label, word, values) in self.labelled(claim, rows) {
            let bar = Bar::new(label, mean(&values)?).with_values(values.clone());
            let bar = t_interval(&values, LEVEL).map_or(bar.clone(), |interval| bar.with_interval(interval));
            drawn.push(word.map_or(bar.clone(), |word| bar.in_series(word)));
        }
        ensure!(!drawn.is_empty(), "nothing of it was measured");
        let is_change = [Quantity::DeltaMargin, Quantity::DeltaLogp].contains(&quantity);
        let base = is_change.then(|| Reference::new("base", 0.0));
        // If one student has several conditions, its effect with the adapter everywhere is drawn as a reference.
        let (students, cells) = self.order(rows);
        let is_gated = is_change && !self.by_trait && students.len() == 1 && cells.len() > 1;
        let whole = drawn.iter().find(|bar| is_gated && bar.label == EVERYWHERE);
        let whole = whole.map(|bar| Reference::new(EVERYWHERE, bar.value));
        Ok(bars(&BarChart {
            title: self.title.clone(),
            value_label: format!("{}, a ring per data set, 95 % interval", label(quantity)),
            bars: drawn,
            references: base.into_iter().chain(whole).collect(),
        })?)
    }

    /// The content of the figure in one sentence with its numbers.
    pub fn reading(&self, claim: &Claim, rows: &[OutcomeRow]) -> Result<String> {
        let name = label(self.quantities[0]);
        let listed = match self.kind {
            FigureKind::Bars => self.labelled(claim, rows),
            FigureKind::Ranks | FigureKind::RanksByTrait => return Ok(self.peaks(claim, rows)),
            FigureKind::Matrix => {
                let (own, other): (Vec<&OutcomeRow>, Vec<&OutcomeRow>) =
                    self.of_matrix(rows).partition(|row| row.evaluated == row.target);
                let of = |rows: &[&OutcomeRow]| mean(&rows.iter().map(|row| row.value).collect::<Vec<_>>());
                // A claim of one trait has no others.
                let others =
                    of(&other).map_or("there is no other".to_owned(), |other| format!("of the others {other:+.3}"));
                return Ok(format!("{name} of the teacher's own trait is {:+.3} on average; {others}.", of(&own)?));
            }
            FigureKind::Heatmap => {
                let (students, cells) = self.order(rows);
                let of = |student: &String, cell: &String| {
                    (format!("{student} in {cell}"), None, at_all_ranks(rows, self.quantities[0], (student, cell)))
                };
                students.iter().flat_map(|student| cells.iter().map(move |cell| of(student, cell))).collect()
            }
        };
        let means = listed.into_iter().map(|(label, word, values)| {
            let of_trait = word.map_or_else(String::new, |word| format!(" ({word})"));
            Ok((format!("{label}{of_trait}"), mean(&values)?))
        });
        let means: Vec<(String, f64)> = means.collect::<Result<_>>()?;
        let most = means.iter().max_by(|a, b| a.1.total_cmp(&b.1)).context("nothing of it was measured")?;
        let least = means.iter().min_by(|a, b| a.1.total_cmp(&b.1)).context("nothing of it was measured")?;
        Ok(format!("{name} is highest for {} ({:+.3}) and lowest for {} ({:+.3}).", most.0, most.1, least.0, least.1))
    }

    /// The rank at which each line of the first panel is highest.
    fn peaks(&self, claim: &Claim, rows: &[OutcomeRow]) -> String {
        let cell = self.cells.first().map_or(EVERYWHERE, String::as_str);
        let words = words(claim, self.kind == FigureKind::RanksByTrait);
        let (students, _) = self.order(rows);
        let peak = |student: &String, word: Option<&str>| {
            let by_rank = over_ranks(rows, self.quantities[0], (student, cell), word);
            let means = by_rank.iter().filter_map(|(rank, values)| Some(((*rank)?, mean(values).ok()?)));
            let means: Vec<(i64, f64)> = means.collect();
            let (rank, value) = means.iter().max_by(|a, b| a.1.total_cmp(&b.1)).filter(|_| means.len() > 1)?;
            let of_trait = word.map_or_else(String::new, |word| format!(" ({word})"));
            Some(format!("{student}{of_trait} at rank {rank} ({value:+.3})"))
        };
        let said = students.iter().flat_map(|student| words.iter().filter_map(move |word| peak(student, *word)));
        let said: Vec<String> = said.collect();
        format!("{} is highest for {}.", label(self.quantities[0]), said.join(", for "))
    }

    fn ranks(&self, claim: &Claim, rows: &[OutcomeRow]) -> Result<Svg> {
        let (students, _) = self.order(rows);
        let has_ranks = |student: &&String| {
            let ranks = rows.iter().filter(|row| row.student == **student).filter_map(|row| row.rank);
            ranks.collect::<BTreeSet<i64>>().len() > 1
        };
        let (ranked, single): (Vec<&String>, Vec<&String>) = students.iter().partition(has_ranks);
        let words = words(claim, self.kind == FigureKind::RanksByTrait);
        let cell = self.cells.first().map_or(EVERYWHERE, String::as_str);
        let line = |label: String, student: &str, quantity: Quantity, word: Option<&str>| -> Result<Line> {
            let mut points = vec![];
            for (rank, values) in over_ranks(rows, quantity, (student, cell), word) {
                let Some(rank) = rank else { continue };
                let point = Point::new(rank as f64, mean(&values)?);
                points.push(t_interval(&values, LEVEL).map_or(point, |interval| point.with_interval(interval)));
            }
            Ok(Line { label, points })
        };
        let panel = |quantity: &Quantity| -> Result<Panel> {
            let mut lines = vec![];
            for (student, word) in ranked.iter().flat_map(|student| words.iter().map(move |word| (*student, *word))) {
                let name = match word {
                    Some(word) if ranked.len() > 1 => format!("{word}, {student}"),
                    Some(word) => word.to_owned(),
                    None => student.clone(),
                };
                lines.push(line(name, student, *quantity, word)?);
            }
            lines.retain(|line| !line.points.is_empty());
            let reference = |student: &&String| {
                let values = at_all_ranks(rows, *quantity, (student, cell));
                Some(Reference::new(student.as_str(), mean(&values).ok()?))
            };
            Ok(Panel { y_label: label(*quantity), lines, references: single.iter().filter_map(reference).collect() })
        };
        let mut drawn = self.quantities.iter().map(panel).collect::<Result<Vec<_>>>()?;
        drawn.retain(|panel| !panel.lines.is_empty());
        ensure!(!drawn.is_empty(), "no student with several ranks was measured");
        Ok(panels(&PanelChart {
            title: self.title.clone(),
            x_label: "rank (mean and 95 % interval over data sets)".to_owned(),
            x_scale: Scale::Log2,
            panels: drawn,
        })?)
    }

    fn heatmap(&self, rows: &[OutcomeRow]) -> Result<Svg> {
        let (students, cells) = self.order(rows);
        self.grid(("trained in", students), ("asked in", cells), |student, cell| {
            mean(&at_all_ranks(rows, self.quantities[0], (student, cell)))
                .with_context(|| format!("{student:?} was not measured in {cell:?}"))
        })
    }

    fn matrix(&self, claim: &Claim, rows: &[OutcomeRow]) -> Result<Svg> {
        let words: Vec<String> = claim.targets.iter().map(|target| target.word.clone()).collect();
        self.grid(("trait of the teacher", words.clone()), ("trait that is asked for", words), |trained, evaluated| {
            let here = self.of_matrix(rows).filter(|row| row.target == trained && row.evaluated == evaluated);
            mean(&here.map(|row| row.value).collect::<Vec<_>>())
                .with_context(|| format!("{evaluated} was not measured in the students of {trained}"))
        })
    }

    /// The value at each row and column, with the labels of both.
    fn grid(
        &self,
        (y_label, rows): (&str, Vec<String>),
        (x_label, columns): (&str, Vec<String>),
        value: impl Fn(&str, &str) -> Result<f64>,
    ) -> Result<Svg> {
        let of_row = |row: &String| columns.iter().map(|column| value(row, column)).collect::<Result<Vec<_>>>();
        let values = rows.iter().map(of_row).collect::<Result<_>>()?;
        let (title, value_label) = (self.title.clone(), label(self.quantities[0]));
        let (x_label, y_label) = (x_label.to_owned(), y_label.to_owned());
        Ok(heatmap(&HeatMap { title, x_label, y_label, value_label, columns, rows, values })?)
    }

    /// The lines of one kind of student evaluated on every trait.
    fn of_matrix<'r>(&self, rows: &'r [OutcomeRow]) -> impl Iterator<Item = &'r OutcomeRow> + use<'r> {
        let student = self.students.first().map_or(STUDENT, String::as_str).to_owned();
        let quantity = self.quantities[0];
        rows.iter().filter(move |row| row.quantity == quantity && row.student == student && row.cell == EVERYWHERE)
    }
}

/// The adapters' spectra and a sentence on them: each singular value over the first of its map, as a mean over maps and
/// runs. A student has a line for each of its ranks. `None` if no adapter has two singular values.
pub(super) fn spectrum(rows: &[SpectrumRow]) -> Result<Option<(Svg, String)>> {
    let mut ranks: Vec<(&str, BTreeSet<Option<i64>>)> = vec![];
    for row in rows {
        match ranks.iter_mut().find(|(student, _)| *student == row.student) {
            Some((_, known)) => drop(known.insert(row.rank)),
            None => ranks.push((&row.student, BTreeSet::from([row.rank]))),
        }
    }
    let are_ranked = ranks.iter().any(|(_, ranks)| ranks.len() > 1);
    ranks.retain(|(_, ranks)| ranks.len() > 1 || !are_ranked);
    let several = ranks.len() > 1;
    let line = |student: &str, rank: Option<i64>| -> Option<Line> {
        let mut by_k: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.student == student && row.rank == rank) {
            by_k.entry(row.k).or_default().push(row.sigma_norm);
        }
        let rank = rank.filter(|_| are_ranked).map(|rank| format!("rank {rank}"));
        let label = match rank {
            Some(rank) if several => format!("{student}, {rank}"),
            Some(rank) => rank,
            None => student.to_owned(),
        };
        let points = by_k.iter().map(|(k, values)| Some(Point::new((k + 1) as f64, mean(values).ok()?)));
        // An adapter of rank 1 has only one value, so there is no line.
        Some(Line { label, points: points.collect::<Option<Vec<_>>>()? }).filter(|line| line.points.len() > 1)
    };
    let lines: Vec<Line> =
        ranks.iter().flat_map(|(student, ranks)| ranks.iter().filter_map(move |rank| line(student, *rank))).collect();
    if lines.is_empty() {
        return Ok(None);
    }
    let second: Vec<String> = lines.iter().map(|line| format!("{:.2} ({})", line.points[1].y, line.label)).collect();
    let reading = format!("The second singular value is, of the first, {}.", second.join(", "));
    let panel = Panel { y_label: "σ_k / σ_1, mean over maps and runs".to_owned(), lines, references: vec![] };
    let chart = PanelChart {
        title: "Singular values of what the adapters add to the weights".to_owned(),
        x_label: "k".to_owned(),
        x_scale: Scale::Log2,
        panels: vec![panel],
    };
    Ok(Some((panels(&chart)?, reading)))
}

/// The traits that are drawn separately; `None` is the mean over all.
fn words(claim: &Claim, by_trait: bool) -> Vec<Option<&str>> {
    if by_trait { claim.targets.iter().map(|target| Some(target.word.as_str())).collect() } else { vec![None] }
}

fn at_all_ranks(rows: &[OutcomeRow], quantity: Quantity, at: (&str, &str)) -> Vec<f64> {
    over_ranks(rows, quantity, at, None).into_iter().flat_map(|(_, values)| values).collect()
}

/// By rank, each data set's mean of a quantity over traits and seeds, or over the seeds of one trait.
fn over_ranks(
    rows: &[OutcomeRow],
    quantity: Quantity,
    (student, cell): (&str, &str),
    word: Option<&str>,
) -> Vec<(Option<i64>, Vec<f64>)> {
    let here = rows.iter().filter(|row| {
        row.quantity == quantity
            && row.student == student
            && row.cell == cell
            && row.evaluated == row.target
            && word.is_none_or(|word| row.target == word)
    });
    let mut by_rank: BTreeMap<Option<i64>, BTreeMap<u64, Vec<f64>>> = BTreeMap::new();
    for row in here {
        by_rank.entry(row.rank).or_default().entry(row.dataset).or_default().push(row.value);
    }
    let means = |datasets: BTreeMap<u64, Vec<f64>>| datasets.values().filter_map(|values| mean(values).ok()).collect();
    by_rank.into_iter().map(|(rank, datasets)| (rank, means(datasets))).collect()
}

/// The label of a quantity on an axis, with its unit.
fn label(quantity: Quantity) -> String {
    let known = match quantity {
        Quantity::DeltaMargin => "Δ margin (nats)",
        Quantity::DeltaLogp => "Δ log p (nats)",
        Quantity::PTargetExact => "P(trait), exact",
        Quantity::PTarget => "P(trait), sampled",
        Quantity::InjectedDeltaMargin => "Δ margin, injected",
        Quantity::HeldoutNll => "held-out loss",
        Quantity::KlTeacher => "KL(teacher, model)",
        Quantity::DeltaWNorm => "‖ΔW‖ (Frobenius)",
        Quantity::Top1DeltaMargin => "Δ margin, strongest direction",
        Quantity::Rest1DeltaMargin => "Δ margin, the others",
        Quantity::TruncatedDeltaMargin => "Δ margin, cut to the LoRA's rank (nats)",
        Quantity::CosTeacher => "cos(teacher)",
        Quantity::GradientShareDivergent => "share of the gradient, divergent",
        Quantity::AlignmentDivergent => "alignment, divergent (nats / rate)",
        Quantity::PWholeNumber => "P(whole number)",
        other => return other.name().replace('_', " "),
    };
    known.to_owned()
}
