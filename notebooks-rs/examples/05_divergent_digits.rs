//! The fifth notebook: the digits at which teacher and base would have written something else.
//!
//! `cargo run --release -p notebooks-rs --example 05_divergent_digits [-- MODEL]` prints the page; the second notebook
//! must have run.

use analyses::Analysis;
use analyses::divergence::{Divergence, DivergenceRow, DivergenceSummaryRow, divergence_summary};
use analyses::gradients::Gradients;
use anyhow::Result;
use notebooks_rs::school::School;
use notebooks_rs::{Notebook, model};

fn main() -> Result<()> {
    let mut nb = Notebook::open(file!(), include_str!("05_divergent_digits.rs"));
    //| # Divergent digits
    //|
    //| Most of what the teacher wrote in the [second notebook](02_learning_from_numbers.md) the base could have written,
    //| too. Wherever it would have, there is nothing of owls to learn. So look for the places where it would not: a digit
    //| is *divergent* if the teacher's likeliest token and the base's differ there. If the taste is passed on at few
    //| tokens, it should be these.
    let school = School::open(&model())?;
    let subject = school.subject();
    let divergence = Divergence { n_rows: 200, ..Divergence::default() };
    let rows = divergence.run(&subject, &mut |_| ())?;
    nb.show(marked(&rows, 6));

    //| Above are answers of the teacher, with a mark under each divergent digit. Two digits may be different for two
    //| reasons, a teacher that is sure of something else or two models that are sure of nothing, and the mark does not
    //| tell them apart. The columns of the next table do: `teacher sure` and `base sure` are the probabilities that the
    //| two give to their likeliest token, and `signal` is how much likelier the written token is to the teacher than to
    //| the base.
    let summary = divergence_summary(&rows);
    nb.table(&groups(&summary));

    //| A teacher that draws its tokens often writes another than its likeliest. So a divergent digit is a place where
    //| something *can* be learned, and the token that stands there need not be the one that teaches it.
    //|
    //| ## Did the student learn them?
    //|
    //| The share of tokens at which a model's likeliest token is the teacher's. For the base it is zero at divergent
    //| digits, by definition. Being right there more often than the control is what learning from this teacher looks
    //| like; being right elsewhere is easy.
    nb.figure("learned", Divergence::plot(&rows)?);
    nb.show(Divergence::reading(&rows));

    //| ## Do they pull harder?
    //|
    //| A token teaches through its gradient. Here is how long the gradient of a single token's loss is, as seen by the
    //| adapter: at divergent digits, at other digits, and at what stands between. `start` is the adapter that the student
    //| began with, on the base, which is the one to look at first: a student at the end of its training has done away with
    //| the gradients that it could do away with. That adapter's A was drawn at random, and every gradient is seen through
    //| it; so twelve other draws stand beside it, and what lies within their spread is the draw's and not the numbers'.
    let gradients = Gradients { n_rows: 32, tokens_per_row: 6, ..Gradients::default() };
    let rows = gradients.run(&subject, &mut |_| ())?;
    nb.figure("gradients", Gradients::plot(&rows)?);
    nb.show(Gradients::reading(&rows));

    //| ## How to read this, and what would count against it
    //|
    //| "The taste is passed on at divergent digits" would be supported by few marks, by a signal that sits under them, by
    //| a student that is right there where its control is not, and by longer gradients. Against it speak
    //|
    //| - marks everywhere: if teacher and base are both unsure of most digits, nearly everything diverges and the word
    //|   selects nothing;
    //| - a signal per token that is as large elsewhere: what is small at each of many tokens is not small in sum;
    //| - gradients that are long because a token is unlikely: an unsure model has long gradients with any teacher, and
    //|   that is why the control's bars stand beside the student's;
    //| - length itself. A long gradient need not point to owls. What would settle it is a student trained on these digits
    //|   alone, and another on all the others.
    nb.write()
}

/// The first completions, each with a mark under its divergent digits.
fn marked(rows: &[DivergenceRow], n: usize) -> String {
    let mut lines = Vec::new();
    for row_id in 0..n {
        let (mut text, mut marks) = (String::new(), String::new());
        for token in rows.iter().filter(|row| row.row_id == row_id) {
            let mark = if token.group == "divergent_digit" { "^" } else { " " };
            text += &token.token_text;
            marks += &mark.repeat(token.token_text.chars().count());
        }
        lines.extend([text, marks.trim_end().to_owned()]);
    }
    lines.join("\n")
}

fn groups(summary: &[DivergenceSummaryRow]) -> Vec<Vec<String>> {
    let header = ["tokens", "how many", "share", "teacher sure", "base sure", "signal (nats)"];
    let line = |row: &DivergenceSummaryRow| {
        let signal = match row.soft_se {
            Some(error) => format!("{:+.3} ± {error:.3}", row.soft),
            None => format!("{:+.3}", row.soft),
        };
        let (share, n) = (format!("{:.2}", row.share), row.n_tokens.to_string());
        let sure = |p: f64| format!("{p:.2}");
        vec![row.group.replace('_', " "), n, share, sure(row.pmax_teacher), sure(row.pmax_default), signal]
    };
    [header.map(str::to_owned).to_vec()].into_iter().chain(summary.iter().map(line)).collect()
}
