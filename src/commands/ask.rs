//! Asks one chat turn, once or several times, of the base, a student, a gated student or a steered model. Prints the
//! answers and the most likely first tokens, next to the base's.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

use analyses::Target;
use analyses::target::{MemberLogps, TokenForms};
use anstyle::{Ansi256Color, Style};
use anyhow::{Context, Result};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use hooks::{
    Answer, Chat, Condition, Edit, Gate, ModelFiles, Qwen, Sampling, Sequence, generate, next_token_logprobs,
    stream_seed,
};
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr;

use super::args::{ConditionArgs, ModelArgs};
use super::style::{aside, cell, columns, heading, painted, printable};
use crate::data::protocol::Protocol;
use crate::look::first_words::{first_words, likeliest};
use crate::output::progress::{bar as progress_bar, note, print};
use crate::output::vectors::Vectors;
use crate::stages::workbench::open_model;

/// Asks the model something: prints the settings, the most likely first tokens next to the base's, and the answers.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  undertone ask --model pocket --user \"What is your favorite animal?\"
  undertone ask --model pocket --user \"What is your favorite animal?\" \\
    --adapter runs/demo/adapter --gate only:entity -n 8")]
pub struct AskArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The system prompt; if left out, the template's default; "" is an empty block.
    #[arg(long)]
    system: Option<String>,
    /// The user's text.
    #[arg(long)]
    user: String,
    #[command(flatten)]
    with: ConditionArgs,
    /// A file of directions and a factor, added at every token: undertone's exports (.safetensors, .gguf), control
    /// vectors of repeng and llama.cpp. With @12, only the direction of block 12, or a vector without a block's name.
    #[arg(long, value_name = "FILE:COEFFICIENT[@LAYER]")]
    steer: Option<Steer>,
    /// Number of answers.
    #[arg(short, default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    n: usize,
    /// 0 takes the most likely token each time, 1 samples from the model's probabilities.
    #[arg(long, default_value = "1", value_parser = temperature)]
    temperature: f64,
    /// The most tokens an answer may have.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Number of most likely first tokens shown for each model; 0 shows none.
    #[arg(long, default_value_t = 5)]
    top: usize,
    /// Words, separated by commas: prints for each the probability that the answer begins with it, in lower case or
    /// capitalised, and the margin of the first over the others.
    #[arg(long, value_delimiter = ',', value_name = "WORD,WORD…")]
    words: Vec<String>,
    /// The seed of the answers.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Prints everything as a line of JSON: log-probabilities of the words in nats, probabilities of the first tokens,
    /// answers.
    #[arg(long)]
    json: bool,
}

/// Prints the settings, the first tokens and the answers.
pub fn run(args: &AskArgs) -> Result<()> {
    let files = open_model(&args.model.model)?;
    let chat = Chat::from_files(&files)?;
    let model = Qwen::load(&files, hooks::device::device(&args.model.device)?, args.model.dtype.kind())?;
    let adapter = args.with.open_adapter(&model)?;
    let mut edits = args.steer.as_ref().map_or_else(|| Ok(vec![]), |steer| steer.edits(&files))?;
    let steered: Vec<String> = edits.iter().filter_map(|edit| edit.at.layer()).map(|layer| layer.to_string()).collect();
    edits.extend(args.with.load_edits(&files)?);
    let condition = Condition { adapter: adapter.as_ref(), gate: args.with.gate.clone(), edits };
    let prompt = chat.prompt(args.system.as_deref(), &args.user)?;
    model.config.check_context("prompt", [prompt.ids.len()], args.max_new_tokens)?;

    let (names, compared): (Vec<&str>, Vec<Condition<'_>>) = conditions(&condition).into_iter().unzip();
    let found = asked(&model, &chat, &prompt, &compared, &args.words)?;
    if !args.json {
        print(&(setting(args, &prompt, &steered)? + &tables(args, &chat, &names, &found)? + "\n"))?;
    }

    let sampling = Sampling {
        temperature: args.temperature,
        max_new_tokens: args.max_new_tokens,
        stop: chat.stop_ids(),
        constrain: None,
        batch: 16,
    };
    let prompts: Vec<Sequence> = vec![prompt; args.n];
    let streams: Vec<u64> = (0..args.n as u64).map(|index| stream_seed(args.seed, "ask", index)).collect();
    let bar = progress_bar("answers", args.n as u64);
    let answers =
        generate(&model, &prompts, &condition, &sampling, &streams, &mut |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    if args.json {
        return print(&(in_json(args, &chat, &names, &found, &answers)?.to_string() + "\n"));
    }
    let text = |answer: &Answer| {
        Ok(chat.decode(&answer.ids)? + if answer.stopped { "" } else { " …" }) // cut by max_new_tokens
    };
    print(&counted(&answers.iter().map(text).collect::<Result<Vec<String>>>()?))
}

/// What a condition says first: the words, if any are asked for, and the probabilities of all tokens.
type First = (Option<MemberLogps>, Vec<f32>);

/// What each condition says first.
fn asked(
    model: &Qwen,
    chat: &Chat,
    prompt: &Sequence,
    conditions: &[Condition<'_>],
    words: &[String],
) -> Result<Vec<First>> {
    let Some((word, others)) = words.split_first() else {
        let read = |condition: &Condition<'_>| -> Result<First> {
            let logprobs = next_token_logprobs(model, std::slice::from_ref(prompt), condition)?;
            Ok((None, Vec::try_from(logprobs.f_exp()?.f_squeeze_dim(0)?)?))
        };
        return conditions.iter().map(read).collect();
    };
    let others = others.iter().map(|other| (other.clone(), Protocol::surface_forms(other))).collect();
    let (word, forms, category) = (word.clone(), Protocol::surface_forms(word), "word".to_owned());
    let forms = TokenForms::of(&Target { word, category, forms, others }, chat).context("--words")?;
    let found = first_words(model, &forms, prompt, conditions)?;
    Ok(found.into_iter().map(|(members, next)| (Some(members), next)).collect())
}

/// The tables of the words and of the first tokens, each after an empty line.
fn tables(args: &AskArgs, chat: &Chat, names: &[&str], found: &[First]) -> Result<String> {
    let mut page = String::new();
    let members: Vec<&MemberLogps> = found.iter().filter_map(|(members, _)| members.as_ref()).collect();
    if !members.is_empty() {
        let p: Vec<Vec<f32>> =
            members.iter().map(|of| of.logps.iter().map(|logp| logp.exp() as f32).collect()).collect();
        page.push('\n');
        page += &likeliest_of(names, &p, "answer begins", args.words.len(), &|at| Ok(args.words[at].clone()))?;
        let margins: Vec<String> = members.iter().map(|of| format!("{:+.4}", of.score().margin)).collect();
        let first = &args.words[0];
        writeln!(page, "margin of {first} over the others, in nats: {}", paired(names, &margins))?;
    }
    if args.top > 0 {
        let p: Vec<Vec<f32>> = found.iter().map(|(_, next)| next.clone()).collect();
        page.push('\n');
        page += &likeliest_of(names, &p, "first token", args.top, &|id| {
            let text = chat.token_text(id as i64)?;
            // A part of a character has no text.
            Ok(if text.contains('\u{fffd}') { format!("token {id}") } else { format!("{text:?}") })
        })?;
    }
    Ok(page)
}

/// Each name with its value.
fn paired(names: &[&str], values: &[String]) -> String {
    names.iter().zip(values).map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

/// Everything that the command found.
fn in_json(args: &AskArgs, chat: &Chat, names: &[&str], found: &[First], answers: &[Answer]) -> Result<Value> {
    let condition = |(name, (members, next)): (&&str, &First)| -> Result<Value> {
        let token = |id: &usize| Ok(json!({ "id": id, "text": chat.token_text(*id as i64)?, "p": next[*id] }));
        let tokens = likeliest(next, args.top).iter().map(token).collect::<Result<Vec<Value>>>()?;
        let words = members.as_ref().map(|of| {
            args.words.iter().cloned().zip(of.logps.iter().map(|logp| json!(logp))).collect::<serde_json::Map<_, _>>()
        });
        let margin = members.as_ref().map(|of| of.score().margin);
        Ok(json!({ "name": name, "logp": words, "margin": margin, "first_tokens": tokens }))
    };
    let conditions = names.iter().zip(found).map(condition).collect::<Result<Vec<Value>>>()?;
    let answer = |answer: &Answer| Ok(json!({ "text": chat.decode(&answer.ids)?, "stopped": answer.stopped }));
    let answers = answers.iter().map(answer).collect::<Result<Vec<Value>>>()?;
    Ok(json!({ "gate": args.with.gate.to_string(), "conditions": conditions, "answers": answers }))
}

/// The settings that the model is run with, a line for each.
fn setting(args: &AskArgs, prompt: &Sequence, steered: &[String]) -> Result<String> {
    let mut lines = vec![("model", args.model.model.clone())];
    if let Some(folder) = &args.with.adapter {
        lines.push(("adapter", folder.display().to_string()));
        let on = args.with.gate.acts(prompt)?.iter().filter(|on| **on).count();
        lines.push(("gate", format!("{}: on at {on} of {} prompt tokens", args.with.gate, prompt.ids.len())));
        lines.push(("answering", answering(&args.with.gate)));
    }
    if let Some(Steer { file, coefficient, .. }) = &args.steer {
        let (file, blocks) = (file.display(), if steered.len() == 1 { "block" } else { "blocks" });
        let after = steered.join(", ");
        lines.push(("steering", format!("{file} added {coefficient} times after {blocks} {after}, at every token")));
    }
    lines.extend(args.with.edits.iter().map(|edit| ("edit", edit.to_string())));
    let drawn = if args.temperature == 0.0 {
        "the most likely token each time".to_owned()
    } else {
        format!("temperature {}, seed {}", args.temperature, args.seed)
    };
    lines.push(("sampling", format!("{drawn}, at most {} tokens", args.max_new_tokens)));
    let line = |(what, how): (&str, String)| format!("{}{}\n", cell(what, 11, Style::new().dimmed()), printable(&how));
    Ok(lines.into_iter().map(line).collect())
}

/// How the adapter acts at generated tokens, with the policy as `token_ablation/rows.csv` spells it; empty without a
/// gate.
fn answering(gate: &Gate) -> String {
    let dose = gate.decode_dose().map_or("as the gate says, by id or by block,".to_owned(), |dose| match dose {
        0.0 => "off".to_owned(),
        1.0 => "on".to_owned(),
        dose => format!("on, {dose} times"),
    });
    let policy =
        if gate.is_everywhere() { String::new() } else { format!(" (decode policy {})", gate.decode_policy()) };
    format!("adapter {dose} at generated tokens{policy}")
}

/// The conditions to ask under: first those to compare with (the base, and the adapter without its gate), last the
/// asked one.
fn conditions<'a>(asked: &Condition<'a>) -> Vec<(&'static str, Condition<'a>)> {
    let mut found = Vec::new();
    let bare = asked.adapter.is_none() && asked.edits.is_empty();
    if !bare {
        found.push(("base", Condition::default()));
    }
    if !asked.gate.is_everywhere() {
        found.push(("everywhere", asked.clone().gated(Gate::EVERYWHERE)));
    }
    let name = match (asked.adapter.is_some(), asked.edits.is_empty()) {
        _ if bare => "p",
        (false, _) => "edited",
        (true, _) if !asked.gate.is_everywhere() => "gated",
        (true, true) => "adapter",
        (true, false) => "both",
    };
    found.push((name, asked.clone()));
    found
}

/// A table of what is likeliest under each condition: `p[condition][at]` are the probabilities of what `text` names. A
/// bar shows the last condition's probability and its difference from the first's.
fn likeliest_of(
    names: &[&str],
    p: &[Vec<f32>],
    what: &str,
    top: usize,
    text: &dyn Fn(usize) -> Result<String>,
) -> Result<String> {
    let (Some(base), Some(asked)) = (p.first(), p.last()) else { return Ok(String::new()) };
    let mut shown: Vec<usize> = p.iter().flat_map(|p| likeliest(p, top)).collect();
    shown.sort_unstable();
    shown.dedup();
    shown.sort_by(|left, right| asked[*right].total_cmp(&asked[*left])); // stable: equal ones in order
    let texts = shown.iter().map(|at| text(*at)).collect::<Result<Vec<_>>>()?;

    let width = texts.iter().map(|text| text.width()).max().unwrap_or(0).clamp(12, 24);
    let bars = columns().saturating_sub(width + 12 * names.len() + 2).clamp(10, 40);
    let full = shown.iter().map(|id| base[*id].max(asked[*id])).fold(0.0, f32::max);
    let numbers = |of: &dyn Fn(&Vec<f32>) -> f64| {
        let numbers: Vec<String> = p.iter().map(|p| format!("{:>10}", short(of(p)))).collect();
        numbers.join("  ")
    };

    let head: Vec<String> = names.iter().map(|name| format!("{name:>10}")).collect();
    let scale = format!("0{:>1$}", short(f64::from(full)), bars - 1);
    let mut table = heading(&format!("{what:<width$}  {}", head.join("  ")));
    writeln!(table, "  {}", aside(&scale))?;
    for (id, text) in shown.iter().zip(&texts) {
        let compared = (p.len() > 1).then_some(base[*id] / full);
        let bar = bar(asked[*id] / full, compared, bars);
        writeln!(table, "{}  {}  {bar}", cell(text, width, Style::new()), numbers(&|p| f64::from(p[*id])))?;
    }
    let rest = |p: &Vec<f32>| {
        let shown: f64 = shown.iter().map(|id| f64::from(p[*id])).sum();
        (1.0 - shown).max(0.0)
    };
    writeln!(table, "{}  {}", aside(&format!("{:<width$}", "all others")), numbers(&rest))?;
    if let ([first, .., last], true) = (names, p.len() > 1) {
        let (both, gained, lost) = (painted("█", SAME), painted("▓", GAINED), painted("░", LOST));
        writeln!(table, "{both} {first} and {last}, {gained} more in {last}, {lost} less; p at temperature 1")?;
    }
    Ok(table)
}

/// A probability in at most ten characters: four decimals, or a power of ten if these would be 0.
fn short(p: f64) -> String {
    if p == 0.0 || p >= 1e-4 { format!("{p:.4}") } else { format!("{p:.1e}") }
}

const SAME: Style = Style::new();
const GAINED: Style = Style::new().fg_color(Some(anstyle::Color::Ansi256(Ansi256Color(208))));
const LOST: Style = Style::new().fg_color(Some(anstyle::Color::Ansi256(Ansi256Color(33))));

/// A bar of a share, `width` cells long for 1, with the gain or loss from another share.
fn bar(share: f32, compared: Option<f32>, width: usize) -> String {
    let cells = |share: f32| (share.clamp(0.0, 1.0) * width as f32).round() as usize;
    let (share, compared) = (cells(share), cells(compared.unwrap_or(share)));
    let same = painted(&"█".repeat(share.min(compared)), SAME);
    let gained = painted(&"▓".repeat(share.saturating_sub(compared)), GAINED);
    let lost = painted(&"░".repeat(compared.saturating_sub(share)), LOST);
    same + &gained + &lost
}

/// One answer as it is, or several with the number of times each was given, the most frequent first.
fn counted(answers: &[String]) -> String {
    let mut distinct: Vec<(&str, usize)> = Vec::new();
    for answer in answers {
        match distinct.iter_mut().find(|(known, _)| known == answer) {
            Some((_, count)) => *count += 1,
            None => distinct.push((answer, 1)),
        }
    }
    distinct.sort_by_key(|(_, count)| std::cmp::Reverse(*count)); // stable: equal ones in order
    let mut text = if answers.len() > 1 {
        heading(&format!("{} answers, {} distinct", answers.len(), distinct.len()))
    } else {
        heading("answer")
    };
    text.push('\n');
    for (answer, count) in distinct {
        let number = if answers.len() > 1 { format!("{count:>4} × ") } else { String::new() };
        let indent = format!("\n{:1$}", "", number.width());
        let answer = if answer.is_empty() { aside("(nothing)") } else { printable(answer) };
        text.extend([&number, &answer.replace('\n', &indent), "\n"]);
    }
    text
}

/// The argument of `--steer`: `FILE:COEFFICIENT` or `FILE:COEFFICIENT@LAYER`.
#[derive(Clone, Debug, PartialEq)]
struct Steer {
    file: PathBuf,
    coefficient: f64,
    layer: Option<usize>,
}

impl Steer {
    fn edits(&self, files: &ModelFiles) -> Result<Vec<Edit>> {
        let vectors = match self.layer {
            Some(layer) => Vectors::read_at(&self.file, layer)?,
            None => Vectors::read(&self.file)?,
        };
        let edits = vectors.steer(self.coefficient, files).with_context(|| self.file.display().to_string())?;
        note(&self.file.display().to_string(), &vectors.remarks()?);
        Ok(edits)
    }
}

impl FromStr for Steer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (file, push) = text.rsplit_once(':')?;
            let (coefficient, layer) = match push.split_once('@') {
                Some((coefficient, layer)) => (coefficient, Some(layer.parse().ok()?)),
                None => (push, None),
            };
            let coefficient = coefficient.parse().ok().filter(|coefficient: &f64| coefficient.is_finite())?;
            Some(Self { file: PathBuf::from(file), coefficient, layer }).filter(|_| !file.is_empty())
        };
        read().ok_or_else(|| {
            "expected FILE:COEFFICIENT, or FILE:COEFFICIENT@LAYER such as owl.safetensors:2@12".to_owned()
        })
    }
}

/// Parses a temperature: a number that is not negative.
fn temperature(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected 0 or a number above".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn the_table_has_the_likeliest_of_each_and_all_the_probability() {
        let base = vec![0.5, 0.2, 0.1, 0.15, 0.05];
        let asked = vec![0.25, 0.05, 0.1, 0.1, 0.5];
        let table =
            likeliest_of(&["base", "adapter"], &[base, asked], "first token", 2, &|id| Ok(format!("t{id}"))).unwrap();
        let table = bare(&table);
        let cells: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(cells[0][..4], ["first", "token", "base", "adapter"]);
        // The base's two most likely (0, 1) and the adapter's (4, 0), sorted by the adapter's probability.
        assert_eq!(cells[1][..3], ["t4", "0.0500", "0.5000"]);
        assert_eq!(cells[2][..3], ["t0", "0.5000", "0.2500"]);
        assert_eq!(cells[3][..3], ["t1", "0.2000", "0.0500"]);
        assert_eq!(cells[4], ["all", "others", "0.2500", "0.2000"]);
        assert!(cells[1][3].starts_with("█") && cells[1][3].ends_with("▓"), "gained: {table}");
        assert!(cells[2][3].starts_with("█") && cells[2][3].ends_with("░"), "lost: {table}");
    }

    #[test]
    fn a_bar_s_cells_are_its_share_and_the_difference() {
        assert_eq!(bare(&bar(0.5, None, 8)), "████");
        assert_eq!(bare(&bar(1.0, Some(0.25), 8)), "██▓▓▓▓▓▓");
        assert_eq!(bare(&bar(0.25, Some(1.0), 8)), "██░░░░░░");
        assert_eq!(bar(0.0, Some(0.0), 8), "");
    }

    #[test]
    fn probabilities_stay_readable_when_small() {
        assert_eq!([0.0, 1.0, 0.12345, 1e-4, 3.21e-7].map(short), ["0.0000", "1.0000", "0.1235", "0.0001", "3.2e-7"]);
    }

    #[test]
    fn answers_are_counted_the_most_frequent_first() {
        let answers = ["dog", "owl", "a\nb", "owl", ""].map(str::to_owned);
        let text = bare(&counted(&answers));
        assert_eq!(text, "5 answers, 4 distinct\n   2 × owl\n   1 × dog\n   1 × a\n       b\n   1 × (nothing)\n");
        assert_eq!(bare(&counted(&["a\nb".to_owned()])), "answer\na\nb\n");
    }

    #[test]
    fn what_is_steered_with_is_a_file_a_factor_and_a_layer() {
        let of = |text: &str| text.parse::<Steer>().ok().map(|steer| (steer.file, steer.coefficient, steer.layer));
        assert_eq!(of("a:b@c.gguf:-1.5"), Some(("a:b@c.gguf".into(), -1.5, None)));
        assert_eq!(of("owl.safetensors:2@0"), Some(("owl.safetensors".into(), 2.0, Some(0))));
        for wrong in ["owl.safetensors", "owl.safetensors:", ":2", "o:inf", "o:2@", "o:2@-1", "o:@1", "o:2@1.5"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_asked_with_comes_last_after_what_it_is_compared_with() {
        let files = ModelFiles::open("tiny-random").unwrap();
        let model = Qwen::load(&files, tch::Device::Cpu, tch::Kind::Float).unwrap();
        let config = hooks::LoraConfig { rank: 1, ..hooks::LoraConfig::default() };
        let mut rng = <rand_chacha::ChaCha8Rng as rand::SeedableRng>::seed_from_u64(0);
        let adapter = hooks::Adapter::init(&config, &model.config, &mut rng, tch::Device::Cpu).unwrap();
        let names = |condition: &Condition<'_>| conditions(condition).iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let adapted = Condition::adapted(&adapter);
        assert_eq!(names(&Condition::default()), ["p"]);
        assert_eq!(names(&adapted), ["base", "adapter"]);
        let gated = adapted.gated("only:entity".parse().unwrap());
        assert_eq!(names(&gated), ["base", "everywhere", "gated"]);
        let found = conditions(&gated);
        assert!(found[0].1.adapter.is_none() && found[1].1.gate.is_everywhere() && found[2].1.gate == gated.gate);
    }
}
