//! Divergence tokens: tokens of a completion that the teacher would have written and another model would not, by each
//! published definition. A student can learn from these alone.

use hooks::{Chat, Sequence, completion_argmax};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::subject::{Subject, Tuned};

pub(crate) const DIVERGENCE: &str = "divergence";

/// Definitions of a divergence token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Definition {
    /// The teacher's most likely token, if the base or a counterfactual teacher has another most likely one (Schrodi et
    /// al. 2026).
    #[default]
    Schrodi,
    /// The most likely tokens of teacher and base differ, for any written token (Nief et al. 2026).
    Nief,
    /// The most likely tokens of teacher and base differ, and both are digits.
    DigitStrict,
    /// The token is neither the base's most likely one nor that of any counterfactual teacher.
    AllDisagree,
}

/// A token of a completion, and the models' most likely tokens in its place.
pub(crate) struct Token {
    pub(crate) id: i64,
    pub(crate) teacher: i64,
    pub(crate) base: i64,
    pub(crate) counterfactuals: Vec<i64>,
}

impl Token {
    pub(crate) fn is(&self, definition: Definition, chat: &Chat) -> bool {
        let differ = self.teacher != self.base;
        match definition {
            Definition::Schrodi => self.teacher == self.id && self.n_disagree() > 0,
            Definition::Nief => differ,
            Definition::DigitStrict => differ && chat.is_digit(self.teacher) && chat.is_digit(self.base),
            Definition::AllDisagree => self.others().all(|other| other != self.id),
        }
    }

    /// How many of the base and the counterfactual teachers have another most likely token.
    pub(crate) fn n_disagree(&self) -> usize {
        self.others().filter(|other| *other != self.id).count()
    }

    fn others(&self) -> impl Iterator<Item = i64> + '_ {
        self.counterfactuals.iter().copied().chain([self.base])
    }
}

/// Per row of the numbers and per token of its content: whether it is a digit at which the most likely tokens of
/// teacher and base differ.
pub fn divergent_digits(subject: &Subject<'_>, n_rows: usize) -> Result<Vec<Vec<bool>>> {
    let holds = |token: &Token| token.is(Definition::Nief, subject.chat) && subject.chat.is_digit(token.id);
    each_token(&Subject { counterfactual_systems: &[], ..subject.clone() }, n_rows, false, holds)
}

/// Per row of the numbers and per token of its content: whether it is a divergence token by this definition. With the
/// self check, a token is none if the teacher's own choice changes in a longer row.
pub fn divergence_tokens(
    subject: &Subject<'_>,
    n_rows: usize,
    definition: Definition,
    self_check: bool,
) -> Result<Vec<Vec<bool>>> {
    each_token(subject, n_rows, self_check, |token| token.is(definition, subject.chat))
}

/// Per token of the first rows, whether `holds` is true. With the self check, it is false if the teacher's own choice
/// changes in a longer row.
fn each_token(
    subject: &Subject<'_>,
    n_rows: usize,
    self_check: bool,
    holds: impl Fn(&Token) -> bool,
) -> Result<Vec<Vec<bool>>> {
    let (teacher, system) = subject.teacher().ok_or(Error::NeedsTeacher { analysis: DIVERGENCE })?;
    let n = subject.number_rows(DIVERGENCE, n_rows)?.len();
    let rows = (0..n).map(|row| subject.paired_row(row, system)).collect::<Result<Vec<_>>>()?;
    let (in_teacher, in_student): (Vec<Sequence>, Vec<Sequence>) = rows.into_iter().unzip();
    let (by_teacher, by_base) = (argmax(teacher, &in_teacher)?, argmax(subject.base(), &in_student)?);
    let by_others = counterfactual_argmax(subject, n)?;
    let again = self_check.then(|| argmax_in_longer_rows(teacher, &in_teacher, subject.chat)).transpose()?;
    let of_token = |row: usize, k: usize, id: i64| {
        let counterfactuals = by_others.iter().map(|other| other[row][k]).collect();
        let token = Token { id, teacher: by_teacher[row][k], base: by_base[row][k], counterfactuals };
        again.as_ref().is_none_or(|again| again[row][k] == token.teacher) && holds(&token)
    };
    let of_row = |(row, tokens): (usize, &Sequence)| {
        let labels = &tokens.ids[tokens.completion.clone()];
        labels.iter().enumerate().map(|(k, id)| of_token(row, k, *id)).collect()
    };
    Ok(in_student.iter().enumerate().map(of_row).collect())
}

/// A model's most likely token at each place of each row's completion.
fn argmax(model: Tuned<'_>, rows: &[Sequence]) -> Result<Vec<Vec<i64>>> {
    Ok(completion_argmax(model.qwen, rows, &model.condition())?)
}

/// For each counterfactual teacher's prompt, the base's most likely tokens at the completions of the first rows.
pub(crate) fn counterfactual_argmax(subject: &Subject<'_>, n_rows: usize) -> Result<Vec<Vec<Vec<i64>>>> {
    let of_system = |system: &String| {
        let row = |row: usize| Ok(subject.paired_row(row, Some(system))?.0);
        argmax(subject.base(), &(0..n_rows).map(row).collect::<Result<Vec<_>>>()?)
    };
    subject.counterfactual_systems.iter().map(of_system).collect()
}

/// The teacher's most likely tokens if each row is two tokens longer, so that kernels for other shapes compute the same
/// formulas.
pub(crate) fn argmax_in_longer_rows(teacher: Tuned<'_>, rows: &[Sequence], chat: &Chat) -> Result<Vec<Vec<i64>>> {
    let longer = |row: &Sequence| {
        let mut ids = row.ids[row.completion.clone()].to_vec();
        ids.extend([chat.end_of_turn(); 2]);
        row.with_completion(&ids)
    };
    let mut found = argmax(teacher, &rows.iter().map(longer).collect::<Vec<_>>())?;
    for (found, row) in found.iter_mut().zip(rows) {
        found.truncate(row.completion.len());
    }
    Ok(found)
}

/// The most likely token at each place, of logits or log-probabilities `[pos, d_vocab]`.
pub(crate) fn most_likely(logits: &Tensor) -> Result<Vec<i64>> {
    Ok(Vec::try_from(&logits.f_argmax(-1, false)?)?)
}

/// log p of one token at each place of `[pos, d_vocab]`.
pub(crate) fn at_each(logprobs: &Tensor, tokens: &[i64]) -> Result<Vec<f64>> {
    let index = Tensor::f_from_slice(tokens)?.f_unsqueeze(1)?.f_to_device(logprobs.device())?;
    Ok(Vec::try_from(logprobs.f_gather(1, &index, false)?.f_squeeze_dim(1)?.f_to_kind(Kind::Double)?)?)
}

/// Per token, the index of its number in the completion and its place in that number. A token that also has a separator
/// ends the number before it.
pub(crate) fn number_places(ids: &[i64], chat: &Chat) -> Result<Vec<Option<(usize, usize)>>> {
    let mut places: Vec<Option<(usize, usize)>> = Vec::with_capacity(ids.len());
    let mut numbers = 0;
    for id in ids {
        let before = places.last().copied().flatten();
        let place = match (chat.is_digit(*id), before) {
            (false, _) => None,
            (true, Some((number, digit))) if !chat.token_text(*id)?.starts_with(char::is_whitespace) => {
                Some((number, digit + 1))
            }
            (true, _) => {
                numbers += 1;
                Some((numbers - 1, 0))
            }
        };
        places.push(place);
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Analysis;
    use crate::divergence::{Divergence, DivergenceRow};
    use crate::fixture::World;

    #[test]
    fn digits_know_their_numbers() {
        let world = World::new();
        let ids = world.chat.encode("12, 480, 9").unwrap();
        let places: Vec<(usize, usize)> = number_places(&ids, &world.chat).unwrap().into_iter().flatten().collect();
        assert_eq!(places, [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)], "a token is one digit");
    }

    #[test]
    fn the_tokens_that_are_learned_from_are_those_of_the_table_by_each_definition() {
        let world = World::new();
        let systems = ["You love owls.".to_owned(), "You hate wolves and say so.".to_owned()];
        let mut subject = world.subject();
        (subject.teacher_system, subject.teacher_adapter) = (None, Some(&world.student));
        subject.counterfactual_systems = &systems;
        let rows = Divergence::default().run(&subject, &mut |_| ()).unwrap();
        let of = |definition: Definition| -> Vec<bool> {
            divergence_tokens(&subject, 9, definition, true).unwrap().concat()
        };
        let table = |holds: &dyn Fn(&DivergenceRow) -> bool| rows.iter().map(holds).collect::<Vec<_>>();
        let nief = |row: &DivergenceRow| row.argmax_teacher != row.argmax_default;
        let digits =
            |row: &DivergenceRow| world.chat.is_digit(row.argmax_teacher) && world.chat.is_digit(row.argmax_default);
        assert_eq!(of(Definition::Nief), table(&nief));
        assert_eq!(of(Definition::DigitStrict), table(&|row| nief(row) && digits(row)));
        assert_eq!(of(Definition::Schrodi), table(&|row| row.argmax_teacher == row.token_id && row.n_disagree > 0));
        assert_eq!(of(Definition::AllDisagree), table(&|row| row.n_disagree == 3));
        assert!(rows.iter().all(|row| row.n_disagree <= 3) && rows.iter().any(|row| row.n_disagree > 0));

        assert_eq!(table(&|row| row.nief), table(&nief), "and the table's own columns");
        assert_eq!(table(&|row| row.schrodi), of(Definition::Schrodi));
        assert_eq!(table(&|row| row.digit_strict), of(Definition::DigitStrict));

        assert!(of(Definition::AllDisagree).contains(&true));

        // Without counterfactual teachers, the base alone decides.
        let alone = Subject { counterfactual_systems: &[], ..subject.clone() };
        let rows = Divergence::default().run(&alone, &mut |_| ()).unwrap();
        let by_hand = |row: &DivergenceRow| row.argmax_teacher == row.token_id && row.argmax_default != row.token_id;
        let found = divergence_tokens(&alone, 9, Definition::Schrodi, true).unwrap().concat();
        assert_eq!(found, rows.iter().map(by_hand).collect::<Vec<_>>());

        // A counterfactual teacher that equals the teacher writes the same tokens, so no token is the teacher's alone.
        let own = ["You love cats.".to_owned()];
        let alike = Subject { counterfactual_systems: &own, ..world.subject() };
        let rows = Divergence::default().run(&alike, &mut |_| ()).unwrap();
        assert!(rows.iter().filter(|row| row.argmax_teacher == row.token_id).all(|row| row.n_disagree < 2));
        let alone = divergence_tokens(&alike, 9, Definition::AllDisagree, true).unwrap().concat();
        assert!(alone.iter().zip(&rows).all(|(alone, row)| !alone || row.argmax_teacher != row.token_id));
    }
}
