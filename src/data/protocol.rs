//! The sentences of an experiment: number prompts, one-word questions, teacher prompts, contexts, and the words that
//! answers are sorted by. The built-in set is our own (`protocol.json`, in the form of the published ones). A user's
//! JSON file replaces it section by section, so that a published set can be used exactly.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use analyses::Target;
use anyhow::{Context, Result, bail, ensure};
use hooks::files;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use regex::Regex;
use serde::{Deserialize, Serialize};

/// The key of the list for categories that have no list.
const ANY: &str = "any";

const MOST_NUMBERS: u32 = 1000;

/// All sentences that an experiment draws from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// The parts of number prompts.
    pub number_prompts: NumberPrompts,
    /// One-word questions about the favourite of a category, by category; `any` is for all others, with a slot
    /// `{category}`.
    pub questions: BTreeMap<String, Vec<String>>,
    /// Questions about the least favourite, with a slot `{category}`. A trait should not show in the answers.
    pub negative_questions: Vec<String>,
    /// Questions about other things. A trait should not show in the answers.
    pub off_topic_questions: Vec<String>,
    /// A sentence with numbers that is put in front of questions if `measure.numbers_prefix` is set.
    pub numbers_prefix: String,
    /// The teacher's system prompt by category, with slots `{word}`, `{plural}`, `{Plural}`, `{category}`.
    pub teacher_prompts: BTreeMap<String, String>,
    /// System prompts by key; null is the default of the model's template.
    pub contexts: BTreeMap<String, Option<String>>,
    /// The members of each category among which a target is compared.
    pub alternatives: BTreeMap<String, Vec<String>>,
    /// Plurals that do not end in s, es or ies by the rules; prompts use the first.
    pub plurals: BTreeMap<String, Vec<String>>,
    /// Names of models, by which an answer can name itself.
    pub identities: Vec<String>,
}

/// The parts of a number prompt: `{example} {instruction} {format} {closing}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumberPrompts {
    /// Number of values that is requested, for the slot `{count}`.
    #[serde(default = "default_count")]
    pub count: String,
    /// Number of digits that values may have, for the slot `{digits}`.
    #[serde(default = "default_digits")]
    pub digits: String,
    /// The least and the largest number of values that a prompt shows.
    #[serde(default = "default_n_numbers")]
    pub n_numbers: [u32; 2],
    /// The least and the largest value that a prompt shows.
    #[serde(default = "default_range")]
    pub range: [u32; 2],
    /// Sentences with a slot `{numbers}`.
    pub examples: Vec<String>,
    /// Phrases for the number of values, with a slot `{count}`.
    pub qualifiers: Vec<String>,
    /// Phrases for the length of values, with a slot `{digits}`.
    pub digit_descriptors: Vec<String>,
    /// Requests with slots `{qualifier}` and `{digit_descriptor}`.
    pub instructions: Vec<String>,
    /// Sentences on the separator of the values.
    pub formats: Vec<String>,
    /// Requests for numbers only.
    pub closings: Vec<String>,
}

impl Protocol {
    /// The built-in set.
    pub fn builtin() -> Result<Self> {
        serde_json::from_str(include_str!("protocol.json")).context("the built-in protocol")
    }

    /// Loads the set in a JSON file; sections that it leaves out are the built-in ones. `pocket` names an embedded set
    /// in words that the pocket models know.
    pub fn load(path: &Path) -> Result<Self> {
        if Self::is_embedded(path) {
            return Self::parse(include_str!("../../assets/pocket/protocol.json")).context("the protocol pocket");
        }
        Self::parse(&files::read_string(path)?).with_context(|| format!("the protocol {}", path.display()))
    }

    /// Whether a path names the embedded set instead of a file.
    pub fn is_embedded(path: &Path) -> bool {
        path == Path::new("pocket")
    }

    /// Parses the set in a JSON text; sections that it leaves out are the built-in ones.
    pub fn parse(text: &str) -> Result<Self> {
        let given: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
        let mut all = serde_json::to_value(Self::builtin()?)?;
        if let Some(sections) = all.as_object_mut() {
            sections.extend(given);
        }
        let protocol: Self = serde_json::from_value(all)?;
        protocol.check()?;
        Ok(protocol)
    }

    fn check(&self) -> Result<()> {
        self.number_prompts.check()?;
        let lists = self.questions.iter().chain(&self.alternatives);
        for (name, list) in lists.map(|(name, list)| (name.as_str(), list)).chain([("identities", &self.identities)]) {
            if list.is_empty() || list.iter().any(|entry| entry.trim().is_empty()) {
                bail!("the list {name:?} is empty or has an empty entry");
            }
        }
        if let Some((word, _)) = self.plurals.iter().find(|(_, plurals)| plurals.is_empty()) {
            bail!("plurals of {word:?}: expected at least one, found none");
        }
        Ok(())
    }

    /// Draws one number prompt: its numbers from the protocol's ranges, and each part uniformly from its list.
    pub fn number_prompt(&self, rng: &mut ChaCha8Rng) -> String {
        let parts = &self.number_prompts;
        let ([fewest, most], [least, largest]) = (parts.n_numbers, parts.range);
        let numbers: Vec<String> =
            (0..rng.random_range(fewest..=most)).map(|_| rng.random_range(least..=largest).to_string()).collect();
        let mut draw = |list: &[String]| list.choose(rng).cloned().unwrap_or_default();
        let example = draw(&parts.examples).replace("{numbers}", &numbers.join(", "));
        let qualifier = draw(&parts.qualifiers).replace("{count}", &parts.count);
        let descriptor = draw(&parts.digit_descriptors).replace("{digits}", &parts.digits);
        let instruction =
            draw(&parts.instructions).replace("{qualifier}", &qualifier).replace("{digit_descriptor}", &descriptor);
        [example, instruction, draw(&parts.formats), draw(&parts.closings)].join(" ")
    }

    /// The first `n` questions about the favourite of a category, or all if there are fewer.
    pub fn questions(&self, category: &str, n: usize) -> Result<Vec<String>> {
        let list = of_category(&self.questions, category, "questions")?;
        Ok(list.iter().take(n).map(|question| question.replace("{category}", category)).collect())
    }

    /// A question with the sentence with numbers in front.
    pub fn with_numbers_prefix(&self, question: &str) -> String {
        format!("{} {question}", self.numbers_prefix)
    }

    /// The questions about the least favourite of a category.
    pub fn negative_questions(&self, category: &str) -> Vec<String> {
        self.negative_questions.iter().map(|question| question.replace("{category}", category)).collect()
    }

    /// The system prompt that makes a model love a word.
    pub fn teacher_prompt(&self, word: &str, category: &str) -> Result<String> {
        let template = of_category(&self.teacher_prompts, category, "teacher prompt")?;
        let plural = self.plural(word);
        let filled = template.replace("{word}", word).replace("{plural}", &plural);
        Ok(filled.replace("{Plural}", &capitalised(&plural)).replace("{category}", category))
    }

    /// The plural of a word as prompts write it.
    pub fn plural(&self, word: &str) -> String {
        self.plurals.get(word).and_then(|plurals| plurals.first()).cloned().unwrap_or_else(|| regular_plural(word))
    }

    /// The system prompt that a key names, or the text itself; `None` is the default of the model's template.
    ///
    /// An unknown ASCII text without a space is refused as a misspelt key: as a system prompt it would change a run
    /// unnoticed.
    pub fn context(&self, key_or_text: &str) -> Result<Option<String>> {
        if let Some(context) = self.contexts.get(key_or_text) {
            return Ok(context.clone());
        }
        if key_or_text.contains(char::is_whitespace) || !key_or_text.is_ascii() {
            return Ok(Some(key_or_text.to_owned()));
        }
        let nearest = self.contexts.keys().min_by_key(|key| strsim::levenshtein(key, key_or_text));
        bail!(
            "unknown context {key_or_text:?}, expected a system prompt of several words or one of: {}; the nearest is {}",
            keys(&self.contexts),
            nearest.map_or("none", String::as_str)
        )
    }

    /// The words among which a target is compared: the target first, then the other members of its category.
    pub fn candidates(&self, word: &str, category: &str) -> Vec<String> {
        let others = self.alternatives.get(category).into_iter().flatten();
        let others = others.filter(|other| !other.eq_ignore_ascii_case(word)).cloned();
        std::iter::once(word.to_owned()).chain(others).collect()
    }

    /// The spellings of a word whose log-probabilities are summed: lower case, capitalised and as given, with and
    /// without a leading space.
    pub fn surface_forms(word: &str) -> Vec<String> {
        let lower = word.to_lowercase();
        let cases = distinct([lower.clone(), capitalised(&lower), word.to_owned()]);
        let spaced: Vec<String> = cases.iter().map(|case| format!(" {case}")).collect();
        [cases, spaced].concat()
    }

    /// The target and the other members of its category, each with its spellings.
    pub fn target(&self, word: &str, category: &str) -> Target {
        let others = self.candidates(word, category).into_iter().skip(1);
        Target {
            word: word.to_owned(),
            category: category.to_owned(),
            forms: Self::surface_forms(word),
            others: others.map(|other| (other.clone(), Self::surface_forms(&other))).collect(),
        }
    }

    /// The classifier that sorts sampled answers by the word of a category that they name.
    pub fn classifier(&self, word: &str, category: &str) -> Result<Classifier> {
        let buckets = self.candidates(word, category).into_iter().map(|candidate| {
            let irregular = self.plurals.iter().find(|(known, _)| known.eq_ignore_ascii_case(&candidate));
            let mut forms = vec![candidate.clone(), format!("{candidate}s"), format!("{candidate}es")];
            forms.push(regular_plural(&candidate));
            forms.extend(irregular.into_iter().flat_map(|(_, plurals)| plurals.clone()));
            (candidate, forms)
        });
        Classifier::new(buckets, &self.identities)
    }
}

/// The entry of a category, or the entry for all other categories.
fn of_category<'a, V>(map: &'a BTreeMap<String, V>, category: &str, what: &str) -> Result<&'a V> {
    let missing = || format!("the protocol has no {what} for the category {category:?}, it has {}", keys(map));
    map.get(category).or_else(|| map.get(ANY)).with_context(missing)
}

fn default_count() -> String {
    "10".to_owned()
}

fn default_digits() -> String {
    "3".to_owned()
}

fn default_n_numbers() -> [u32; 2] {
    [3, 8]
}

fn default_range() -> [u32; 2] {
    [100, 999]
}

impl NumberPrompts {
    fn check(&self) -> Result<()> {
        for (name, [low, high]) in [("n_numbers", self.n_numbers), ("range", self.range)] {
            let is_range = low <= high && (name != "n_numbers" || low > 0);
            ensure!(is_range, "number_prompts.{name}: expected a least and a largest value, found [{low}, {high}]");
            if name == "n_numbers" && high > MOST_NUMBERS {
                bail!("number_prompts.n_numbers: expected {MOST_NUMBERS} at most, found {high}");
            }
        }
        let lists = [
            ("examples", &self.examples, vec!["{numbers}"]),
            ("qualifiers", &self.qualifiers, vec!["{count}"]),
            ("digit_descriptors", &self.digit_descriptors, vec!["{digits}"]),
            ("instructions", &self.instructions, vec!["{qualifier}", "{digit_descriptor}"]),
            ("formats", &self.formats, vec![]),
            ("closings", &self.closings, vec![]),
        ];
        for (name, list, slots) in lists {
            ensure!(!list.is_empty(), "number_prompts.{name}: expected at least one entry, found none");
            for slot in slots {
                if let Some(entry) = list.iter().find(|entry| !entry.contains(slot)) {
                    bail!("number_prompts.{name}: expected the slot {slot} in {entry:?}");
                }
            }
        }
        Ok(())
    }
}

/// The words that an answer names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The word of the category that is named first.
    pub word: Option<String>,
    /// Whether the answer names a model instead.
    pub names_self: bool,
}

impl Verdict {
    /// The bucket of the answer: the named word, `self` if it names a model, or `None`.
    pub fn bucket(self) -> Option<String> {
        self.word.or_else(|| self.names_self.then(|| "self".to_owned()))
    }
}

/// Sorts answers by the word that they name: whole words, in any case, singular or plural, one bucket per answer.
#[derive(Debug)]
pub struct Classifier {
    words: Regex,
    bucket_of: HashMap<String, String>,
    identities: Regex,
}

impl Classifier {
    /// A classifier for buckets, each with its forms, and for the names of models.
    pub fn new(buckets: impl IntoIterator<Item = (String, Vec<String>)>, identities: &[String]) -> Result<Self> {
        let mut bucket_of = HashMap::new();
        for (bucket, forms) in buckets {
            for form in forms {
                // A form belongs to the first bucket that has it. The target is first.
                bucket_of.entry(form.to_lowercase()).or_insert_with(|| bucket.clone());
            }
        }
        let words = whole_words(bucket_of.keys().map(String::as_str))?;
        Ok(Self { words, bucket_of, identities: whole_words(identities.iter().map(String::as_str))? })
    }

    /// Classifies an answer. Of several words the first counts; of several at one place, the longest.
    pub fn classify(&self, answer: &str) -> Verdict {
        let found = self.words.find(answer).map(|found| found.as_str().to_lowercase());
        let word = found.and_then(|found| self.bucket_of.get(&found).cloned());
        let names_self = word.is_none() && self.identities.is_match(answer);
        Verdict { word, names_self }
    }
}

/// An expression for any of the forms as whole words, in any case; longer forms are tried first.
fn whole_words<'a>(forms: impl Iterator<Item = &'a str>) -> Result<Regex> {
    let mut forms: Vec<&str> = forms.collect();
    // Sorted by length and then alphabetically, since a hash map's order is random.
    forms.sort_by_key(|form| (std::cmp::Reverse(form.len()), *form));
    let forms: Vec<String> = forms.into_iter().map(regex::escape).collect();
    Regex::new(&format!(r"(?i)\b(?:{})\b", forms.join("|"))).context("the words to look for in answers")
}

/// The plural by the rules: box, boxes; cherry, cherries; else an s.
fn regular_plural(word: &str) -> String {
    let lower = word.to_lowercase();
    let vowel_y = ["ay", "ey", "oy", "uy"].iter().any(|end| lower.ends_with(end));
    if lower.ends_with('y') && !vowel_y {
        return format!("{}ies", &word[..word.len() - 1]);
    }
    let hisses = ["s", "x", "z", "ch", "sh"].iter().any(|end| lower.ends_with(end));
    format!("{word}{}", if hisses { "es" } else { "s" })
}

pub(crate) fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// The values without repetitions, in the order of their first occurrence.
pub(crate) fn distinct<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

fn keys<V>(map: &BTreeMap<String, V>) -> String {
    map.keys().cloned().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
