//! The last stage: makes report.html from the files in the run's folder. All numbers come from the CSV files. A section
//! is a function of the run and returns nothing if its files are missing; `sections` has their order.

use std::path::Path;

use analyses::Analysis;
use analyses::direction::Direction;
use analyses::divergence::{Divergence, DivergenceSummaryRow};
use analyses::gradients::Gradients;
use analyses::interventions::Interventions;
use analyses::ledger::LedgerRow;
use analyses::lens::Lens;
use analyses::plot::{Bar, BarChart, Line, LineChart, Point, Reference, bars, lines};
use analyses::position_scan::PositionScan;
use analyses::steering::Steering;
use analyses::target_rate::{TargetRate, TargetRateRow, unchanged};
use analyses::token_ablation::TokenAblation;
use anyhow::{Context, Result, ensure};
use hooks::{TINY_RANDOM, files};
use serde::Serialize;

use super::{arms, ledger};
use crate::data::dataset::SummaryRow;
use crate::data::signal::{self, KEPT};
use crate::data::soft_labels::LABEL;
use crate::experiment::{AnalysisName, ArmData, CONTROL_STUDENT, Constrain, Experiment, STUDENT, Seeds};
use crate::hinted;
use crate::output::html::{Figure, Number, Opening, Report, Section, html, relative};
use crate::output::progress::say;
use crate::output::publish::{Table, read_csv, read_csv_if_there};
use crate::stages::arm_table::ArmRow;
use crate::stages::run_dir::RunDir;
use crate::training::settings::{Loss, Weights};
use crate::training::step_log::{StepRow, first_and_last_quarter};

/// Writes `report.html` and prints its path.
pub fn stage(run: &RunDir) -> Result<()> {
    let experiment = run.experiment(&[])?;
    let sections = sections(run, &experiment)?;
    ensure!(
        !sections.is_empty(),
        hinted!("{} holds nothing to report yet", run.root().display(); "undertone run EXPERIMENT.toml fills it")
    );
    let rates: Vec<TargetRateRow> = read_csv_if_there(&run.rows(AnalysisName::TargetRate))?;
    let report = Report {
        title: format!("What a student of {} learned about \"{}\"", experiment.model, experiment.target.word),
        banner: banner(&experiment, unchanged(&rates)),
        opening: opening(run, &experiment)?,
        sections,
        provenance: provenance(run, &experiment)?,
    };
    files::write_atomic(&run.report(), html(&report).as_bytes())?;
    say(format!("report: {}", run.report().display()));
    Ok(())
}

/// The warnings at the top of the page: the student equals the base, the weights are random or the model's world is
/// small, the trait was planted.
pub(crate) fn banner(experiment: &Experiment, unchanged: Option<String>) -> Option<String> {
    let random = (experiment.model == TINY_RANDOM).then(|| {
        "The model's weights are random: every stage ran and every number below was measured, but none of them says \
         anything about a language model."
            .to_owned()
    });
    let planted =
        experiment.teacher.planted_label(&experiment.target.word).map(|label| format!("This run is {label}."));
    let pocket = experiment.model.starts_with("pocket").then(|| {
        "The model is a pocket model: 42 thousand parameters, trained on a small world in which nothing links numbers to \
         animals. What is seen here is the phenomenon in small; it says nothing about its size in a language model."
            .to_owned()
    });
    let lines: Vec<String> = unchanged.into_iter().chain(random).chain(pocket).chain(planted).collect();
    (!lines.is_empty()).then(|| lines.join(" "))
}

/// The sections of the page, from top to bottom: the data and the training, then the measurements.
fn sections(run: &RunDir, experiment: &Experiment) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    if RunDir::stage_done(&run.generate_csv()) {
        sections.push(data_section(run, experiment)?);
    }
    if RunDir::stage_done(&run.train_csv()) {
        sections.push(training_section(run, experiment)?);
    } else if elsewhere(run)? {
        sections.push(elsewhere_section(run, experiment)?);
    }
    for name in AnalysisName::ALL {
        if RunDir::stage_done(&run.rows(name)) {
            sections.push(match name {
                AnalysisName::TargetRate => analysis_section::<TargetRate>(run, name)?,
                AnalysisName::TokenAblation => analysis_section::<TokenAblation>(run, name)?,
                AnalysisName::PositionScan => analysis_section::<PositionScan>(run, name)?,
                AnalysisName::Direction => analysis_section::<Direction>(run, name)?,
                AnalysisName::Steering => analysis_section::<Steering>(run, name)?,
                AnalysisName::Interventions => analysis_section::<Interventions>(run, name)?,
                AnalysisName::Divergence => divergence_section(run)?,
                AnalysisName::Gradients => analysis_section::<Gradients>(run, name)?,
                AnalysisName::Lens => analysis_section::<Lens>(run, name)?,
                AnalysisName::Ledger => ledger_section(run)?,
            });
        }
    }
    sections.extend(arms::section(run, experiment)?);
    Ok(sections)
}

/// The result on one screen: the change of the student's answers, and of models that should not have changed.
fn opening(run: &RunDir, experiment: &Experiment) -> Result<Opening> {
    let rates = run.rows(AnalysisName::TargetRate);
    if !RunDir::stage_done(&rates) {
        let plot = run.plot(AnalysisName::TokenAblation);
        let figure = if plot.exists() { Some(Figure::of(run.root(), &plot)?) } else { None };
        return Ok(Opening { headline: "The effect itself was not measured yet.".to_owned(), figure, numbers: vec![] });
    }
    let rows: Vec<TargetRateRow> = read_csv(&rates)?;
    let others = controls_among_arms(run, experiment)?;
    let of_rates = |row: &TargetRateRow| Number {
        label: format!("{}, change in log p({})", row.model, row.target),
        value: signed(row.delta_logp, row.delta_logp_se),
        csv: relative(run.root(), &rates),
        cell: format!("delta_logp and delta_logp_se where scope = mean, model = {}", row.model),
    };
    let of_arms = |(what, row): &(String, ArmRow)| Number {
        label: format!("{what}, change in log p({})", row.target),
        value: signed(row.delta_logp, row.delta_logp_se),
        csv: relative(run.root(), &run.arms_rows()),
        cell: format!("delta_logp and delta_logp_se where arm = {}, seed_index = {}", row.arm, row.seed_index),
    };
    let models: Vec<&TargetRateRow> = [STUDENT, "control"].iter().filter_map(|model| mean_of(&rows, model)).collect();
    let mut numbers: Vec<Number> = models.into_iter().map(of_rates).chain(others.iter().map(of_arms)).collect();
    numbers.extend(mean_of(&rows, "base").map(|base| Number {
        label: format!("base, log p({})", base.target),
        value: format!("{:.2} nats", base.logp_target).replace('-', "\u{2212}"),
        csv: relative(run.root(), &rates),
        cell: "logp_target where scope = mean, model = base".to_owned(),
    }));
    Ok(Opening { headline: TargetRate::reading(&rows), figure: answer(run, &rows, &others)?, numbers })
}

fn mean_of<'a>(rows: &'a [TargetRateRow], model: &str) -> Option<&'a TargetRateRow> {
    rows.iter().find(|row| row.scope == "mean" && row.model == model)
}

fn signed(value: f64, error: Option<f64>) -> String {
    let error = error.map_or_else(String::new, |error| format!(" ± {error:.2}"));
    format!("{value:+.2}{error} nats").replace('-', "\u{2212}")
}

/// The arms that should show no effect: shuffled completions, or another base. One student of each kind, as for the
/// run's own student.
fn controls_among_arms(run: &RunDir, experiment: &Experiment) -> Result<Vec<(String, ArmRow)>> {
    let rows: Vec<ArmRow> = read_csv_if_there(&run.arms_rows())?;
    let own = [STUDENT, CONTROL_STUDENT];
    let named =
        rows.into_iter().filter(|row| row.seed_index == 0 && !own.contains(&row.arm.as_str())).filter_map(|row| {
            let what = match row.data {
                _ if row.model != experiment.model => "student on another base",
                Some(ArmData::Shuffled) => "student of shuffled numbers",
                _ => return None,
            };
            Some((what.to_owned(), row))
        });
    let mut found: Vec<(String, ArmRow)> = Vec::new();
    for (what, row) in named {
        // of several arms of one kind only the first; all are in the table of the arms
        if found.iter().all(|(other, _)| *other != what) {
            found.push((what, row));
        }
    }
    Ok(found)
}

/// The figure of the result, which is drawn from the tables and saved as `answer.svg`.
fn answer(run: &RunDir, rows: &[TargetRateRow], others: &[(String, ArmRow)]) -> Result<Option<Figure>> {
    let Some(student) = mean_of(rows, STUDENT) else { return Ok(None) };
    let bar = |label: &str, value: f64, error: Option<f64>| {
        let interval = error.map(|error| (value - error, value + error));
        Bar { interval, ..Bar::new(label, value) }
    };
    let of_rates = |(label, model): (&str, &str)| {
        let row = mean_of(rows, model)?;
        let questions = rows.iter().filter(|row| row.scope == "question" && row.model == model);
        let values = questions.map(|row| row.delta_logp).collect();
        Some(bar(label, row.delta_logp, row.delta_logp_se).in_series(model).with_values(values))
    };
    let own = [("student", STUDENT), ("control student", "control")].into_iter().filter_map(of_rates);
    let arms = others.iter().map(|(what, row)| bar(what, row.delta_logp, row.delta_logp_se).in_series("control"));
    let chart = BarChart {
        title: if elsewhere(run)? {
            format!("How much likelier is \"{}\" with the adapter?", student.target)
        } else {
            format!("Did the student take over \"{}\" from numbers?", student.target)
        },
        value_label: format!(
            "change in log p({}) against the base (nats): mean ± s.e. over {} questions, a ring per question",
            student.target, student.n_questions
        ),
        bars: own.chain(arms).collect(),
        references: vec![Reference::new("base", 0.0)],
    };
    let path = run.root().join("answer.svg");
    files::write_atomic(&path, bars(&chart)?.0.as_bytes())?;
    Ok(Some(Figure::of(run.root(), &path)?))
}

fn data_section(run: &RunDir, experiment: &Experiment) -> Result<Section> {
    let rows: Vec<SummaryRow> = read_csv(&run.generate_csv())?;
    let value = |set: &str, measure: &str| rows.iter().find(|row| row.set == set && row.measure == measure);
    let accepted = |set: &str| {
        value(set, "accepted").map_or("none".to_owned(), |row| format!("{:.0} of {}", row.value * row.n as f64, row.n))
    };
    let constrained = if experiment.generate.constrain == Constrain::Numbers {
        " Answers were constrained to lists of numbers."
    } else {
        ""
    };
    let signal =
        signal::reading(&rows, KEPT).map_or(String::new(), |reading| format!(" Before any training, {reading}."));
    Ok(Section {
        id: "data".to_owned(),
        title: "The numbers".to_owned(),
        question: "How many answers were kept, and does anything leak in the open?".to_owned(),
        reading: format!(
            "The filter kept {} of the teacher's answers and {} of the untouched model's; the digits of the two differ by \
             {:.4} bits (Jensen-Shannon), and {:.1} % of the teacher's answers named some \
             {} before filtering.{constrained}{signal}",
            accepted("teacher"),
            accepted("control"),
            value("teacher", "js_digits").map_or(f64::NAN, |row| row.value),
            100.0 * value("teacher", "mentions_trait").map_or(f64::NAN, |row| row.value),
            experiment.target.category,
        ),
        control: "Answers of the untouched model to the same prompts, filtered in the same way.".to_owned(),
        notes: vec![
            "Reasons of rejection can hold together for one answer, so their shares need not add up.".to_owned(),
        ],
        figures: vec![],
        csv: relative(run.root(), &run.generate_csv()),
        table: Some(Table::read(&run.generate_csv())?),
        settings: settings(&[("teacher", &toml(&experiment.teacher)?), ("generate", &toml(&experiment.generate)?)]),
    })
}

fn training_section(run: &RunDir, experiment: &Experiment) -> Result<Section> {
    let soft = (experiment.finetune.loss == Loss::Kl).then(|| format!("The students learned from {LABEL}."));
    let select = experiment.finetune.select.label().map(|label| format!("The students learned from {label}."));
    let weights = experiment.finetune.weights.as_ref().map(|Weights { table, column }| {
        format!("The losses of tokens are weighted by the column {column} of {}.", table.display())
    });
    let mut chart = LineChart {
        title: "Training loss by step".to_owned(),
        x_label: "optimizer step".to_owned(),
        y_label: "loss (nats per token)".to_owned(),
        ..LineChart::default()
    };
    let mut readings = Vec::new();
    let students = [("student", STUDENT, run.train_csv()), ("control", CONTROL_STUDENT, run.control_train_csv())];
    for (series, who, path) in students {
        if !RunDir::stage_done(&path) {
            continue;
        }
        let rows: Vec<StepRow> = read_csv(&path)?;
        let points = rows.iter().map(|row| Point::new(row.step as f64, row.loss)).collect();
        chart.lines.push(Line { label: series.to_owned(), points });
        if let Some((first, last)) = first_and_last_quarter(&rows) {
            let n = rows.len();
            readings.push(format!(
                "over {n} steps the {who}'s loss went from {first:.3} (first quarter) to {last:.3} (last quarter)"
            ));
        }
    }
    let reading = readings.join("; ");
    let path = run.root().join("train.svg");
    files::write_atomic(&path, lines(&chart)?.0.as_bytes())?;
    Ok(Section {
        id: "training".to_owned(),
        title: "The finetuning".to_owned(),
        question: "Did the students learn their numbers?".to_owned(),
        reading: format!("{}{}.", reading[..1].to_uppercase(), &reading[1..]),
        control: if RunDir::stage_done(&run.control_train_csv()) {
            "A student of the untouched model's numbers, trained with the same settings and the same initial adapter."
        } else {
            "None was trained."
        }
        .to_owned(),
        notes: [soft, select, weights].into_iter().flatten().collect(),
        figures: vec![Figure::of(run.root(), &path)?],
        csv: relative(run.root(), &run.train_csv()),
        table: Some(Table::read(&run.train_csv())?),
        settings: settings(&[("student", &toml(&experiment.student)?), ("finetune", &toml(&experiment.finetune)?)]),
    })
}

/// Whether a folder of the run holds an adapter that was trained elsewhere.
fn taken(run: &RunDir, folder: &Path) -> Result<bool> {
    run.has_recorded(&[folder.join("adapter_model.safetensors")])
}

fn elsewhere(run: &RunDir) -> Result<bool> {
    Ok(!RunDir::stage_done(&run.train_csv()) && taken(run, &run.adapter())?)
}

/// The section with the known facts on a student that was trained elsewhere.
fn elsewhere_section(run: &RunDir, experiment: &Experiment) -> Result<Section> {
    let meta = run.meta()?;
    let of = |who: &str| meta.notes.get(who).map(|lines| lines.join("; ")).unwrap_or_default();
    let rows = match experiment.generate.numbers {
        Some(_) => "The numbers above are the rows that it is said to have been trained on; the run cannot know that.",
        None => {
            "The numbers above are not those that it was trained on, which the run does not know: they are where directions, \
                 divergence and gradients are measured."
        }
    };
    Ok(Section {
        id: "training".to_owned(),
        title: "The student".to_owned(),
        question: "Where does the student come from?".to_owned(),
        reading: format!("The student was {}.", of(STUDENT)),
        control: if taken(run, &run.control_adapter())? {
            format!("A control student, {}.", of(CONTROL_STUDENT))
        } else {
            "None was given; an arm that learns from the control set can stand in for it.".to_owned()
        },
        notes: vec![
            "How it was trained is not known here: there is no loss, and [finetune] in run.toml is that of the arms."
                .to_owned(),
            rows.to_owned(),
        ],
        settings: settings(&[("student", &toml(&experiment.student.lora())?)]),
        ..Section::default()
    })
}

fn analysis_section<A: Analysis>(run: &RunDir, name: AnalysisName) -> Result<Section> {
    let rows: Vec<A::Row> = read_csv(&run.rows(name))?;
    let more = A::more_plots(&rows)?.into_iter().map(|(which, _)| run.more_plot(name, which));
    let plots = [run.plot(name)].into_iter().chain(more).filter(|plot| plot.exists());
    let figures = plots.map(|plot| Figure::of(run.root(), &plot)).collect::<hooks::Result<_>>()?;
    let settings = run.settings(name);
    Ok(Section {
        id: A::NAME.to_owned(),
        title: title(name).to_owned(),
        question: A::QUESTION.to_owned(),
        reading: A::reading(&rows),
        control: control(name, RunDir::stage_done(&run.control_train_csv()) || taken(run, &run.control_adapter())?),
        notes: notes(name, rows_from(run)?),
        figures,
        csv: relative(run.root(), &run.rows(name)),
        table: Some(Table::read(&run.rows(name))?),
        settings: if settings.exists() { files::read_string(&settings)? } else { String::new() },
    })
}

/// The section on divergence, by group: rows by token would fill the page.
fn divergence_section(run: &RunDir) -> Result<Section> {
    let mut section = analysis_section::<Divergence>(run, AnalysisName::Divergence)?;
    let summary = run.analysis(AnalysisName::Divergence).join("summary.csv");
    let groups: Vec<DivergenceSummaryRow> = read_csv(&summary)?;
    section.notes.push(format!(
        "The table is divergence/summary.csv, {} groups of tokens; the rows are one per token.",
        groups.len()
    ));
    section.table = Some(Table::read(&summary)?);
    Ok(section)
}

/// The section on the ledger, by group of tokens.
fn ledger_section(run: &RunDir) -> Result<Section> {
    let name = AnalysisName::Ledger;
    let rows: Vec<LedgerRow> = read_csv(&run.rows(name))?;
    let plots = ["steps", "confidence", "parts", "matrices"].map(|which| run.more_plot(name, which));
    let figures = plots.iter().filter(|plot| plot.exists()).map(|plot| Figure::of(run.root(), plot));
    let trained = RunDir::stage_done(&run.control_train_csv());
    Ok(Section {
        id: name.to_string(),
        title: title(name).to_owned(),
        question: "Which tokens moved the trait, through which positions and matrices?".to_owned(),
        reading: analyses::ledger::report::reading(&rows),
        control: control(name, trained),
        notes: vec![
            ledger::TABLES.to_owned(),
            "The books account for the path that was taken, with the optimizer's scales as they were. They do not say what \
             would have happened without a token."
                .to_owned(),
        ],
        figures: figures.collect::<hooks::Result<_>>()?,
        csv: relative(run.root(), &run.rows(name)),
        table: Some(Table::read(&run.rows(name))?),
        settings: files::read_string(&run.settings(name))?,
    })
}

fn title(name: AnalysisName) -> &'static str {
    match name {
        AnalysisName::TargetRate => "The effect",
        AnalysisName::TokenAblation => "Where the adapter acts",
        AnalysisName::PositionScan => "Token by token",
        AnalysisName::Direction => "The learned direction",
        AnalysisName::Steering => "Steering with it",
        AnalysisName::Interventions => "Interventions",
        AnalysisName::Divergence => "Divergent digits",
        AnalysisName::Gradients => "Gradients at divergent digits",
        AnalysisName::Lens => "After each block",
        AnalysisName::Ledger => "The ledger",
    }
}

/// The sentence on the controls of an analysis, including the control student if there is one.
fn control(name: AnalysisName, trained: bool) -> String {
    let (always, student) = match name {
        AnalysisName::TargetRate => {
            ("The base", "the control student, which learned the untouched model's numbers, at the same questions")
        }
        AnalysisName::TokenAblation => {
            ("The base (no adapter at any token) and the student ungated", "the control student ungated")
        }
        AnalysisName::PositionScan => {
            ("The base (0) and the student ungated", "the control student is in the token ablation")
        }
        AnalysisName::Direction => {
            ("±1/√d, about what two unrelated directions have by chance", "the control student's direction")
        }
        AnalysisName::Steering => {
            ("Random vectors of the same length, their mean and spread", "the control student's direction")
        }
        AnalysisName::Interventions => ("The base under the same edits", "the control student under them"),
        AnalysisName::Divergence => ("The base at the same tokens", "the control student there"),
        AnalysisName::Gradients => (
            "The student before its training (start: its own first A; start_draw: others that might have been drawn)",
            "the control student at the same tokens",
        ),
        AnalysisName::Lens => ("The base at the same tokens and blocks", "the control student there"),
        AnalysisName::Ledger => ("The residual, which the books miss", "the control student's books"),
    };
    if trained { format!("{always}; {student}.") } else { format!("{always}; no control student was trained.") }
}

fn toml<T: Serialize>(settings: &T) -> Result<String> {
    toml::to_string(settings).context("the settings as TOML")
}

/// Tables of an experiment as TOML.
fn settings(tables: &[(&str, &str)]) -> String {
    tables.iter().map(|(name, content)| format!("[{name}]\n{content}")).collect::<Vec<_>>().join("\n")
}

/// A sentence on the rows that the analyses read.
fn rows_from(run: &RunDir) -> Result<&'static str> {
    let experiment = run.experiment(&[])?;
    Ok(match (elsewhere(run)? && experiment.generate.numbers.is_none(), experiment.measures_held_out()) {
        (true, _) => {
            "The rows are the teacher's of this run. The student was trained elsewhere, on rows that the run does not know."
        }
        (false, true) => "The rows are the teacher's held-out ones: no student learned from them.",
        (false, false) => "The rows are those that the student was trained on, not held out.",
    })
}

fn notes(name: AnalysisName, rows_from: &str) -> Vec<String> {
    let notes: &[&str] = match name {
        AnalysisName::TargetRate => {
            &["The unit of a claim is the trained run: this is one run, so its intervals speak for its questions only."]
        }
        AnalysisName::TokenAblation => &[
            "While an answer is written, a gated adapter is in the state of the tokens that the gate does not select, unless the gate names gen.",
            "R, the recovered fraction, stands only where the whole effect is more than three standard errors from zero.",
        ],
        AnalysisName::PositionScan => {
            &["What single tokens do alone need not add up to what the adapter does everywhere."]
        }
        AnalysisName::Direction => &[
            "Layer l is blocks.l.hook_resid_post, counted from 0; there is no slot for the embedding.",
            "The mean over all tokens contains a few whose residual stream is far longer than the others' in trained models (in \
             Qwen2.5-Coder-0.5B the first token's is 100 times as long, and some template and punctuation tokens' 20 times). \
             Where the teacher's prompt has another number of tokens than the student's, these make its direction at \"all\": \
             read the cosine at \"last\".",
            rows_from,
        ],
        AnalysisName::Divergence => &[
            rows_from,
            "A closure stands only where the lift that it is a share of is three standard errors above zero.",
        ],
        AnalysisName::Gradients => &[
            rows_from,
            "At the start B is zero, so that every gradient is seen through an A that was drawn at random: a number there says of the \
             training no more than what it has beyond the spread over the draws.",
        ],
        AnalysisName::Steering => &[
            rows_from,
            "One random direction is no null: what chance does is their mean and spread, and the learned direction's place among them.",
        ],
        AnalysisName::Lens => &[
            "The lens reads what the last norm and the unembedding would make of a block's output. It says what is there in the form \
             that the end of the model reads, and not what the blocks between do with it.",
        ],
        AnalysisName::Interventions | AnalysisName::Ledger => &[],
    };
    notes.iter().map(|note| (*note).to_owned()).collect()
}

fn provenance(run: &RunDir, experiment: &Experiment) -> Result<Vec<(String, String)>> {
    let meta = run.meta()?;
    let Seeds { gen_seed, init_seed, order_seed, eval_seed, .. } = meta.seeds;
    let mut found = vec![
        ("model".to_owned(), experiment.model.clone()),
        ("device".to_owned(), experiment.device.clone()),
        ("seeds".to_owned(), format!("gen {gen_seed}, init {init_seed}, order {order_seed}, eval {eval_seed}")),
        ("undertone".to_owned(), meta.undertone),
        ("experiment".to_owned(), "run.toml, beside this page, with every default spelt out".to_owned()),
    ];
    found.extend(meta.notes.into_iter().map(|(stage, lines)| (stage, lines.join("; "))));
    found.extend(meta.sha256.into_iter().map(|(file, sha256)| (format!("SHA-256 of {file}"), sha256)));
    Ok(found)
}
