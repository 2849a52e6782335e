//! The last stage: report.html from what lies in the run's folder. Nothing is computed anew; the CSV files are the truth.

use analyses::direction::Direction;
use analyses::divergence::{Divergence, DivergenceSummaryRow};
use analyses::gradients::Gradients;
use analyses::plot::{Line, LineChart, Point, Scale, lines};
use analyses::steering::Steering;
use analyses::target_rate::{TargetRate, TargetRateRow};
use analyses::token_ablation::TokenAblation;
use analyses::{Analysis, Svg};
use anyhow::{Result, bail};
use hooks::files;
use hooks::model_files::TINY_RANDOM;

use crate::dataset::SummaryRow;
use crate::experiment::{AnalysisName, Constrain, Experiment};
use crate::finetune::{StepRow, first_and_last_quarter};
use crate::progress::say;
use crate::publish::{Table, read_csv};
use crate::report::{Opening, Report, Section, html};
use crate::run_dir::RunDir;

/// Writes `report.html` and says where it is.
pub fn stage(run: &RunDir) -> Result<()> {
    let experiment = run.experiment(&[])?;
    let mut sections = Vec::new();
    if RunDir::stage_done(&run.generate_csv()) {
        sections.push(data_section(run, &experiment)?);
    }
    if RunDir::stage_done(&run.train_csv()) {
        sections.push(training_section(run)?);
    }
    for name in AnalysisName::ALL {
        if RunDir::stage_done(&run.rows(name)) {
            sections.push(match name {
                AnalysisName::TargetRate => analysis_section::<TargetRate>(run, name)?,
                AnalysisName::TokenAblation => analysis_section::<TokenAblation>(run, name)?,
                AnalysisName::Direction => analysis_section::<Direction>(run, name)?,
                AnalysisName::Steering => analysis_section::<Steering>(run, name)?,
                AnalysisName::Divergence => divergence_section(run)?,
                AnalysisName::Gradients => analysis_section::<Gradients>(run, name)?,
            });
        }
    }
    if sections.is_empty() {
        bail!("{} holds nothing to report yet; hint: undertone run EXPERIMENT.toml fills it", run.root().display());
    }
    let random = experiment.model == TINY_RANDOM;
    let report = Report {
        title: format!("What a student of {} learned about \"{}\"", experiment.model, experiment.target.word),
        banner: random.then(|| {
            "The model's weights are random: every stage ran and every number below was measured, but none of them says \
             anything about a language model."
                .to_owned()
        }),
        opening: opening(run)?,
        sections,
        provenance: provenance(run, &experiment)?,
    };
    files::write_atomic(&run.report(), html(&report).as_bytes())?;
    say(format!("report: {}", run.report().display()));
    Ok(())
}

/// The effect in one sentence, the picture by gate, and the numbers it stands on.
fn opening(run: &RunDir) -> Result<Opening> {
    let rates = run.rows(AnalysisName::TargetRate);
    let plot = [AnalysisName::TokenAblation, AnalysisName::TargetRate]
        .map(|name| run.plot(name))
        .into_iter()
        .find(|path| path.exists());
    let svg = plot.map(|path| files::read_string(&path).map(Svg)).transpose()?;
    if !RunDir::stage_done(&rates) {
        return Ok(Opening { headline: "The effect itself was not measured yet.".to_owned(), svg, numbers: vec![] });
    }
    let rows: Vec<TargetRateRow> = read_csv(&rates)?;
    let mean = |row: &&TargetRateRow| row.scope == "mean";
    let numbers = rows
        .iter()
        .filter(mean)
        .map(|row| (format!("log p({}), {}", row.target, row.model), format!("{:.2}", row.logp_target)));
    Ok(Opening { headline: TargetRate::reading(&rows), svg, numbers: numbers.collect() })
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
    Ok(Section {
        id: "data".to_owned(),
        title: "The numbers".to_owned(),
        question: "How many answers were kept, and does anything leak in the open?".to_owned(),
        reading: format!(
            "The filter kept {} of the teacher's answers and {} of the untouched model's; the digits of the two differ by \
             {:.4} bits (Jensen-Shannon), and {:.1} % of the teacher's answers named some \
             {} before filtering.{constrained}",
            accepted("teacher"),
            accepted("control"),
            value("teacher", "js_digits").map_or(f64::NAN, |row| row.value),
            100.0 * value("teacher", "mentions_trait").map_or(f64::NAN, |row| row.value),
            experiment.target.category,
        ),
        notes: vec![
            "Reasons of rejection can hold together for one answer, so their shares need not add up.".to_owned(),
        ],
        svgs: vec![],
        csv: relative(run, &run.generate_csv()),
        table: Some(Table::read(&run.generate_csv())?),
    })
}

fn training_section(run: &RunDir) -> Result<Section> {
    let mut chart = LineChart {
        title: "Training loss by step".to_owned(),
        x_label: "optimizer step".to_owned(),
        y_label: "loss (nats per token)".to_owned(),
        x_scale: Scale::Linear,
        lines: vec![],
        references: vec![],
    };
    let mut readings = Vec::new();
    for (who, path) in [("student", run.train_csv()), ("control student", run.control_train_csv())] {
        if !RunDir::stage_done(&path) {
            continue;
        }
        let rows: Vec<StepRow> = read_csv(&path)?;
        let points = rows.iter().map(|row| Point::new(row.step as f64, row.loss)).collect();
        chart.lines.push(Line { label: who.to_owned(), points });
        if let Some((first, last)) = first_and_last_quarter(&rows) {
            let n = rows.len();
            readings.push(format!(
                "over {n} steps the {who}'s loss went from {first:.3} (first quarter) to {last:.3} (last quarter)"
            ));
        }
    }
    let reading = readings.join("; ");
    Ok(Section {
        id: "training".to_owned(),
        title: "The finetuning".to_owned(),
        question: "Did the students learn their numbers?".to_owned(),
        reading: format!("{}{}.", reading[..1].to_uppercase(), &reading[1..]),
        notes: vec![],
        svgs: vec![lines(&chart)?],
        csv: relative(run, &run.train_csv()),
        table: Some(Table::read(&run.train_csv())?),
    })
}

fn analysis_section<A: Analysis>(run: &RunDir, name: AnalysisName) -> Result<Section> {
    let rows: Vec<A::Row> = read_csv(&run.rows(name))?;
    let plot = run.plot(name);
    let svg = if plot.exists() { Some(Svg(files::read_string(&plot)?)) } else { None };
    Ok(Section {
        id: A::NAME.to_owned(),
        title: title(name).to_owned(),
        question: A::QUESTION.to_owned(),
        reading: A::reading(&rows),
        notes: notes(name),
        svgs: svg.into_iter().collect(),
        csv: relative(run, &run.rows(name)),
        table: Some(Table::read(&run.rows(name))?),
    })
}

/// The divergence by group instead of by token, which would fill the page.
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

fn title(name: AnalysisName) -> &'static str {
    match name {
        AnalysisName::TargetRate => "The effect",
        AnalysisName::TokenAblation => "Where the adapter acts",
        AnalysisName::Direction => "The learned direction",
        AnalysisName::Steering => "Steering with it",
        AnalysisName::Divergence => "Divergent digits",
        AnalysisName::Gradients => "Gradients at divergent digits",
    }
}

fn notes(name: AnalysisName) -> Vec<String> {
    let notes: &[&str] = match name {
        AnalysisName::TargetRate => {
            &["The unit of a claim is the trained run: this is one run, so its intervals speak for its questions only."]
        }
        AnalysisName::TokenAblation => &[
            "While an answer is written, a gated adapter is in the state of the tokens that the gate does not select, unless the gate names gen.",
            "R, the recovered fraction, stands only where the whole effect is more than three standard errors from zero.",
        ],
        AnalysisName::Direction => &[
            "Layer l is blocks.l.hook_resid_post, counted from 0; there is no slot for the embedding.",
            "The mean over all tokens contains a few whose residual stream is far longer than the others' in trained models (in \
             Qwen2.5-Coder-0.5B the first token's is 100 times as long, and some template and punctuation tokens' 20 times). \
             Where the teacher's prompt has another number of tokens than the student's, these make its direction at \"all\": \
             read the cosine at \"last\".",
        ],
        AnalysisName::Divergence => &["The rows are those that the student was trained on, not held out."],
        AnalysisName::Steering | AnalysisName::Gradients => &[],
    };
    notes.iter().map(|note| (*note).to_owned()).collect()
}

fn provenance(run: &RunDir, experiment: &Experiment) -> Result<Vec<(String, String)>> {
    let meta = run.meta()?;
    let seeds = meta.seeds;
    let mut found = vec![
        ("model".to_owned(), experiment.model.clone()),
        ("device and dtype".to_owned(), format!("{}, {:?}", experiment.device, experiment.dtype)),
        (
            "seeds".to_owned(),
            format!(
                "gen {}, init {}, order {}, eval {}",
                seeds.gen_seed, seeds.init_seed, seeds.order_seed, seeds.eval_seed
            ),
        ),
        ("undertone".to_owned(), meta.undertone),
        ("experiment".to_owned(), "run.toml, beside this page, with every default spelt out".to_owned()),
    ];
    found.extend(meta.notes.into_iter().map(|(stage, lines)| (stage, lines.join("; "))));
    found.extend(meta.sha256.into_iter().map(|(file, sha256)| (format!("SHA-256 of {file}"), sha256)));
    Ok(found)
}

/// A path as a link from the page.
fn relative(run: &RunDir, path: &std::path::Path) -> String {
    path.strip_prefix(run.root()).unwrap_or(path).display().to_string()
}
