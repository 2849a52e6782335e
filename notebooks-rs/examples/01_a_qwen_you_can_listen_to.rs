//! The first notebook: a model, its tokens, its activations, a tap that changes it, and a gate on an adapter.
//!
//! `cargo run --release -p notebooks-rs --example 01_a_qwen_you_can_listen_to [-- MODEL]` prints the page: beside the
//! other pages for the embedded model, into the folder you are in for a model of your own.

use analyses::plot::{HeatMap, heatmap};
use anyhow::Result;
use hooks::{
    Adapter, Batch, Cache, Chat, Condition, Gate, HookPoint, Hooks, LoraConfig, ModelFiles, Pass, Qwen, Sequence,
    next_token_logprobs,
};
use notebooks_rs::{Notebook, model};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

fn main() -> Result<()> {
    let mut nb = Notebook::open(file!(), include_str!("01_a_qwen_you_can_listen_to.rs"));
    //| # A Qwen you can listen to
    //|
    //| A language model reads a row of tokens and says, at each of them, which token it expects next. In between lie a
    //| few hundred intermediate results, its *activations*. Here we load a model, look at some of them, change one on
    //| the way, and end with the question that this toolkit is for: if a model was finetuned, at which tokens does
    //| what it learned do its work?
    //|
    //| One thing before we begin. Unless you name a model of your own, this page runs on a tiny Qwen that the toolkit
    //| carries with it; the lines under the first block say which. It has the anatomy of the real thing and runs in a
    //| second on any laptop, but a model so small knows little of the world. Read the page for how one looks; what there is
    //| to see, a larger model shows better.
    let files = ModelFiles::open(&model())?;
    let model = Qwen::load(&files, Device::Cpu, Kind::Float)?;
    let chat = Chat::from_files(&files)?;
    nb.show(files.report.join("\n"));

    //| ## What the model reads
    //|
    //| You type a question. The model reads a good deal more: a system prompt that nobody typed, the names of who is
    //| speaking, and markers for where each turn begins and ends. Every token gets a *class* that says what it is
    //| there for. Each token has exactly one, so classes are a way to point at places in a prompt.
    let prompt = chat.prompt(None, QUESTION)?;
    let tokens = chat.table(&prompt)?;
    let mut rows = vec![["position", "token", "class"].map(str::to_owned).to_vec()];
    for token in &tokens {
        rows.push(vec![token.position.to_string(), quoted(&token.text), token.class.to_string()]);
    }
    nb.table(&rows);

    //| Remember the rows of class `sys.entity`: the model is told its own name. We come back to them.
    //|
    //| ## Listening
    //|
    //| Think of the model as a conveyor belt with one tray per token. Each block in turn looks at the trays, and adds
    //| something to each of them. The belt is called the *residual stream*; what lies on it after block 3 is
    //| `blocks.3.hook_resid_post`. There are more than twenty such places per block, all named as TransformerLens
    //| names them. A `Cache` is an ear that is put to some of them during one forward pass.
    let n_layers = model.config.n_layers;
    let streams: Vec<HookPoint> = (0..n_layers).map(HookPoint::ResidPost).collect();
    let batch = Batch::of(&[&prompt], Device::Cpu)?;
    let mut heard = Cache::default();
    let logits = tch::no_grad(|| {
        let hooks = Hooks::default().on([HookPoint::Embed].into_iter().chain(streams.iter().copied()), &mut heard);
        model.forward(&batch, &mut Pass { hooks, ..Pass::default() })
    })?;
    nb.show(format!("logits {:?}, one score per token of the vocabulary at every position", logits.size()));
    let mut lengths = Vec::new();
    for (point, activation) in heard.iter() {
        let length = f64::try_from(activation.norm_scalaropt_dim(2.0, -1_i64, false).mean(Kind::Float))?;
        lengths.push(format!("{point} {:?}, mean length {length:.2}", activation.size()));
    }
    nb.show(lengths.join("\n"));

    //| So what would it answer? The scores at the last position become probabilities by a softmax. How much of the whole
    //| the first lines hold says how sure the model is.
    let last = prompt.ids.len() as i64 - 1;
    let before = logits.get(0).get(last).log_softmax(-1, Kind::Float);
    nb.table(&favorites(&chat, &before)?);

    //| ## The logit lens
    //|
    //| The final scores are read off the belt by one matrix, after the last block. Nothing stops us from holding that
    //| matrix to the belt earlier: what would the model say if it had to stop here? That is the *logit lens*
    //| (nostalgebraist, 2020). Below, every row is a place to stop, every column one of the last tokens of the prompt,
    //| and the color is the probability, at that place, of the token that the whole model ends up preferring. The last
    //| row is the model's own word on the matter. Where a column darkens from row to row, one sees the answer surface block
    //| by block; where it does so in the last row only, everything before was about something else.
    let shown = prompt.ids.len().min(12);
    let from = (prompt.ids.len() - shown) as i64;
    let choice = logits.get(0).argmax(-1, true).narrow(0, from, shown as i64);
    let mut values = Vec::new();
    for (_, stream) in heard.iter() {
        let lens = tch::no_grad(|| model.unembed(&stream.get(0).narrow(0, from, shown as i64)))?;
        let chosen = lens.softmax(-1, Kind::Float).gather(1, &choice, false).flatten(0, -1);
        values.push(Vec::<f64>::try_from(chosen.to_kind(Kind::Double))?);
    }
    nb.figure(
        "lens",
        heatmap(&HeatMap {
            title: "How early does the model know what it will say?".to_owned(),
            x_label: "token of the prompt".to_owned(),
            y_label: "stop after".to_owned(),
            value_label: "probability of the final choice".to_owned(),
            columns: tokens[from as usize..].iter().map(|token| token.text.clone()).collect(),
            rows: heard.iter().map(|(point, _)| point.to_string()).collect(),
            values: values.iter().map(|row| row.iter().map(|value| rounded(*value)).collect()).collect(),
        })?,
    );

    //| ## Meddling
    //|
    //| Listening and changing are the same thing here. A *tap* is any function that receives an activation and
    //| returns one; the model goes on with what it returns. A cache returns what it got. This one returns zeros, so
    //| the first block's MLP adds nothing to any tray. The model itself is never touched: the tap lives for one pass.
    let mut silence = |_at: HookPoint, x: Tensor| Ok(x.zeros_like());
    let changed = tch::no_grad(|| {
        let hooks = Hooks::default().on([HookPoint::MlpOut(0)], &mut silence);
        model.forward(&batch, &mut Pass { hooks, ..Pass::default() })
    })?;
    let after = changed.get(0).get(last).log_softmax(-1, Kind::Float);
    nb.table(&favorites(&chat, &after)?);
    nb.show(format!("moved by {:.2} nats (Kullback-Leibler divergence)", moved(&before, &after)?));

    //| That one MLP had a say in the matter. A pass with neither taps nor adapter is the untouched model again:
    let untouched = tch::no_grad(|| model.forward(&batch, &mut Pass::default()))?;
    nb.show(format!("the same scores as before, bit by bit: {}", untouched == logits));

    //| ## Patching
    //|
    //| A tap may also put something on a tray that comes from elsewhere: from the same model, run on another prompt. Here
    //| the other prompt asks the same question and tells the model that it is somebody else.
    let default = chat.default_system().unwrap_or("You are Qwen, a helpful assistant.");
    let other = chat.prompt(Some(&default.replace("Qwen", "Claude")), QUESTION)?;
    let places = [HookPoint::Embed].into_iter().chain(streams.iter().copied());
    let mut theirs = Cache::default();
    let said = tch::no_grad(|| {
        let hooks = Hooks::default().on(places.clone(), &mut theirs);
        model.forward(&Batch::of(&[&other], Device::Cpu)?, &mut Pass { hooks, ..Pass::default() })
    })?;
    let claude = said.get(0).get(-1).log_softmax(-1, Kind::Float);
    let apart = moved(&claude, &before)?;
    nb.table(&favorites(&chat, &claude)?);
    nb.show(format!("the two answers are {apart:.3} nats apart"));

    //| Take the tray of one token after one block from the other run, lay it in its place here, and see how far the answer
    //| follows. One pass per block does all tokens, for each row of a batch gets another one. What is drawn is the share
    //| of the distance between the two answers that is gone: 0 where nothing changed, 1 where the other answer came out.
    let width = same_end(&prompt, &other);
    let (ours, their) = (prompt.ids.len() - width, other.ids.len() - width);
    let mut followed = Vec::new();
    for place in places.clone() {
        let trays = theirs.get(place)?.get(0);
        let mut patch = |_at: HookPoint, x: Tensor| {
            let patched = x.copy();
            for row in 0..width {
                patched.get(row as i64).get((ours + row) as i64).copy_(&trays.get((their + row) as i64));
            }
            Ok(patched)
        };
        let said = tch::no_grad(|| {
            let hooks = Hooks::default().on([place], &mut patch);
            model.forward(&Batch::of(&vec![&prompt; width], Device::Cpu)?, &mut Pass { hooks, ..Pass::default() })
        })?;
        let said = said.select(1, -1).log_softmax(-1, Kind::Float);
        let gone = (0..width as i64).map(|row| Ok(rounded(1.0 - moved(&claude, &said.get(row))? / apart)));
        followed.push(gone.collect::<Result<Vec<_>>>()?);
    }
    nb.figure(
        "patching",
        heatmap(&HeatMap {
            title: "Which tray carries who one is?".to_owned(),
            x_label: "token whose tray is from the other run".to_owned(),
            y_label: "patched after".to_owned(),
            value_label: "share of the distance gone".to_owned(),
            columns: tokens[ours..].iter().map(|token| token.text.clone()).collect(),
            rows: places.map(|place| place.to_string()).collect(),
            values: followed,
        })?,
    );

    //| After the last block only the last token counts, for there the answer is read off, and it must be 1. Read the rows
    //| from below: wherever a cell is strong, somebody carried the difference there from further up and further left, and
    //| the row above says from where. Where one row has no strong cell at all, it was carried by several at once.
    //|
    //| ## An adapter, and where it acts
    //|
    //| A LoRA finetunes a model without touching its weights: beside a big matrix W stand two thin ones, and the
    //| layer computes W x + s · B A x. Training starts with B = 0, where the adapter does nothing. We have not trained
    //| anything, so we fill B with small random numbers instead: an adapter that has learned *something*, if nothing
    //| sensible. The numbers come from a seeded generator, so that your page reads as this one does.
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut rng, Device::Cpu)?;
    for (name, mut parameter) in adapter.parameters() {
        if name.contains("lora_B") {
            let values: Vec<f32> = (0..parameter.numel()).map(|_| rng.random_range(-0.2..0.2)).collect();
            tch::no_grad(|| parameter.f_copy_(&Tensor::from_slice(&values).view_as(&parameter)))?;
        }
    }

    //| Now the question from the beginning. A *gate* says at which tokens the adapter acts, in terms of the classes
    //| above. `everywhere` is the finetuned student, `nowhere` is the base, and between the two lie the interesting
    //| ones: what is left of the student if the adapter only ever sees the model's own name?
    let prompts = [prompt];
    let base = next_token_logprobs(&model, &prompts, &Condition::default())?.get(0);
    let mut rows = vec![["gate", "tokens it acts at", "moves the answer by (nats)"].map(str::to_owned).to_vec()];
    for gate in
        ["everywhere", "nowhere", "only:entity", "only:user", "only:template", "only:assistant", "except:assistant"]
    {
        let gate: Gate = gate.parse()?;
        let Ok(acts) = gate.acts(&prompts[0]) else { continue }; // it names a class that this prompt does not have
        let acts = acts.into_iter().filter(|acts| *acts).count();
        let condition = Condition::adapted(&adapter).gated(gate.clone());
        let student = next_token_logprobs(&model, &prompts, &condition)?.get(0);
        let (acts, moved) = (format!("{acts} of {}", prompts[0].ids.len()), format!("{:.3}", moved(&base, &student)?));
        rows.push(vec![gate.to_string(), acts, moved]);
    }
    nb.table(&rows);

    //| `nowhere` moves nothing at all, which is as it must be. Do not read much into the rest: this adapter pushes at every
    //| token alike, so what counts is mostly how many tokens a gate has and who stands next to the answer; the last tokens
    //| of the template, the assistant's header, are where it is read off. It is a lesson for real experiments, too: compare
    //| with an adapter that learned something else, before you believe a bar.
    //|
    //| A trained adapter need not be like this one. When a model picks up a taste from a teacher's numbers, a few
    //| tokens that carry no meaning can carry most of the effect, and a table like this is how one finds out which.
    //|
    //| ## Where to go from here
    //|
    //| - An adapter that was really trained, on nothing but numbers: [Learning from numbers](02_learning_from_numbers.md),
    //|   and the notebooks after it.
    //| - The same page for a real model: `make model`, and then this notebook with the model's path as its argument.
    //| - What the model reads, on the command line: `undertone tokens --model pocket --user "What is your favorite animal?"`.
    nb.write()
}

/// How many tokens two prompts have in common at their ends, counted from their first difference where they are of one
/// length: then every token has its place in both.
fn same_end(a: &Sequence, b: &Sequence) -> usize {
    let n = a.ids.len();
    if n == b.ids.len() {
        return n - a.ids.iter().zip(&b.ids).take_while(|(a, b)| a == b).count();
    }
    a.ids.iter().rev().zip(b.ids.iter().rev()).take_while(|(a, b)| a == b).count()
}

/// What the model is asked.
const QUESTION: &str = "What is your favorite animal?";

/// The five likeliest tokens and their probabilities, as rows. `logprobs`: `[d_vocab]`.
fn favorites(chat: &Chat, logprobs: &Tensor) -> Result<Vec<Vec<String>>> {
    let (values, ids) = logprobs.topk(5, -1, true, true);
    let mut rows = vec![vec!["next token".to_owned(), "probability".to_owned()]];
    for (id, value) in Vec::<i64>::try_from(ids)?.into_iter().zip(Vec::<f64>::try_from(values.to_kind(Kind::Double))?) {
        rows.push(vec![quoted(&chat.token_text(id)?), format!("{:.3}", value.exp())]);
    }
    Ok(rows)
}

/// A token's text in quotes, which show its spaces.
fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// The Kullback-Leibler divergence of two distributions over the vocabulary, `[d_vocab]` each, as logs.
fn moved(from: &Tensor, to: &Tensor) -> Result<f64> {
    let sum = f64::try_from((from.exp() * (from - to)).sum(Kind::Double))?;
    Ok(sum.abs()) // a divergence is never negative; rounding is
}

/// Three decimals, so that the figure is the same on processors that add in another order.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
