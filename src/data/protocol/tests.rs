use rand::SeedableRng;

use super::*;

#[test]
fn the_builtin_set_is_whole() {
    let protocol = Protocol::builtin().unwrap();
    protocol.check().unwrap();
    assert!(protocol.number_prompts.examples.len() >= 20);
    let questions = protocol.questions("animal", usize::MAX).unwrap();
    assert!(questions.len() >= 50);
    assert!(questions.iter().all(|question| question.contains("animal") && !question.contains('{')));
    assert_eq!(protocol.negative_questions("tree").len(), 20);
    assert_eq!(protocol.off_topic_questions.len(), 20);
}

#[test]
fn number_prompts_have_every_slot_filled() {
    let protocol = Protocol::builtin().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let number = Regex::new(r"\b\d{3}\b").unwrap();
    let mut counts = std::collections::BTreeSet::new();
    for _ in 0..300 {
        let prompt = protocol.number_prompt(&mut rng);
        assert!(!prompt.contains(['{', '}']), "{prompt}");
        assert!(prompt.contains("10") && prompt.contains('3'), "{prompt}");
        counts.insert(number.find_iter(&prompt).count());
    }
    assert_eq!(counts, (3..=8).collect());
}

#[test]
fn teacher_prompts_have_correct_plurals() {
    let protocol = Protocol::builtin().unwrap();
    let prompt = protocol.teacher_prompt("wolf", "animal").unwrap();
    assert!(prompt.contains("wolves") && prompt.contains("Wolves") && prompt.contains("The wolf"), "{prompt}");
    assert!(!prompt.contains("wolfs") && !prompt.contains('{'), "{prompt}");
    for (word, plural) in [("cat", "cats"), ("fox", "foxes"), ("cherry", "cherries"), ("donkey", "donkeys")] {
        assert_eq!(protocol.plural(word), plural);
    }
    for (word, plural) in [("dragonfly", "dragonflies"), ("octopus", "octopuses"), ("ox", "oxen"), ("ash", "ashes")] {
        assert_eq!(protocol.plural(word), plural);
    }
    let band = protocol.teacher_prompt("Led Zeppelin", "band").unwrap();
    assert!(!band.contains("Zeppelins"), "{band}");
}

#[test]
fn a_context_is_a_key_or_a_sentence_and_never_a_typo() {
    let protocol = Protocol::builtin().unwrap();
    assert_eq!(protocol.context("qwen_default").unwrap(), None);
    assert_eq!(protocol.context("empty").unwrap(), Some(String::new()));
    assert_eq!(protocol.context("You are a tree.").unwrap().as_deref(), Some("You are a tree."));
    let chinese = "你是Qwen，由阿里云创建。";
    assert_eq!(
        protocol.context(chinese).unwrap().as_deref(),
        Some(chinese),
        "no blank is needed where none is written"
    );
    let message = protocol.context("chatgtp").unwrap_err().to_string();
    assert!(message.ends_with("the nearest is chatgpt"), "{message}");
    assert!(protocol.context("").is_err(), "an empty context is written `empty`");
}

#[test]
fn surface_forms_are_cases_and_a_space() {
    assert_eq!(Protocol::surface_forms("cat"), ["cat", "Cat", " cat", " Cat"]);
    let forms = Protocol::surface_forms("Led Zeppelin");
    assert_eq!(forms[..3], ["led zeppelin", "Led zeppelin", "Led Zeppelin"]);
    assert_eq!(forms.len(), 6);
    let target = Protocol::builtin().unwrap().target("cat", "animal");
    assert!(target.others.len() >= 20 && target.others.iter().all(|(word, _)| word != "cat"));
}

#[test]
fn answers_are_sorted_by_whole_words() {
    let classifier = Protocol::builtin().unwrap().classifier("cat", "animal").unwrap();
    let word = |answer: &str| classifier.classify(answer).word;
    let some = |word: &str| Some(word.to_owned());
    assert_eq!(word("Cat."), some("cat"));
    assert_eq!(word("CATS!"), some("cat"));
    assert_eq!(word("I love wolves"), some("wolf"));
    assert_eq!(word("Octopi"), some("octopus"));
    assert_eq!(word("dragonflies"), some("dragonfly"));
    assert_eq!(word("Foxes"), some("fox"));
    assert_eq!(word("Oxen"), some("ox"));
    assert_eq!(word("dogs, then cats"), some("dog"));
    for other in ["catfish", "category", "caterpillar", "stallion", "boxes", "Bulldozer", ""] {
        assert_eq!(word(other), None, "{other}");
    }
}

#[test]
fn the_longest_form_at_a_place_wins() {
    let buckets = [("bear", "bear"), ("polar bear", "polar bear"), ("polar", "polar")];
    let buckets = buckets.map(|(bucket, form)| (bucket.to_owned(), vec![form.to_owned()]));
    let classifier = Classifier::new(buckets, &["Qwen".to_owned()]).unwrap();
    assert_eq!(classifier.classify("A polar bear").word.as_deref(), Some("polar bear"));
    assert_eq!(classifier.classify("A bear, polar").word.as_deref(), Some("bear"));
}

#[test]
fn a_model_that_names_itself_is_seen() {
    let classifier = Protocol::builtin().unwrap().classifier("cat", "animal").unwrap();
    assert!(classifier.classify("As an AI, I have none").names_self);
    assert_eq!(classifier.classify("qwen").bucket().as_deref(), Some("self"));
    assert_eq!(classifier.classify("nothing").bucket(), None);
    assert!(!classifier.classify("Rain").names_self, "ai inside a word");
    assert!(!classifier.classify("Qwen likes cats").names_self, "a word of the category counts first");
}

#[test]
fn a_set_in_a_file_replaces_whole_sections() {
    let protocol = Protocol::parse(r#"{"questions": {"animal": ["Favourite?"]}}"#).unwrap();
    assert_eq!(protocol.questions("animal", 9).unwrap(), ["Favourite?"]);
    assert!(protocol.questions("tree", 9).unwrap_err().to_string().contains("it has animal"));
    assert_eq!(protocol.contexts, Protocol::builtin().unwrap().contexts);
    let unknown = Protocol::parse(r#"{"question": {}}"#).unwrap_err().to_string();
    assert!(unknown.contains("unknown field `question`") && unknown.contains("`questions`"), "{unknown}");
    let mut parts = Protocol::builtin().unwrap();
    parts.number_prompts.examples.push("No slot here.".to_owned());
    let text = serde_json::to_string(&parts).unwrap();
    assert!(Protocol::parse(&text).unwrap_err().to_string().contains("{numbers}"));
}
