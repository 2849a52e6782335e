use std::collections::BTreeSet;

use super::*;
use crate::training::settings::Select;

const SIZE: &str = "[values]\ntargets = [{ word = \"cat\", category = \"animal\" }, { word = \"owl\", category = \"animal\" }]\n\
                    ranks = [1, 4]\nother = \"chatgpt\"\n[experiment]\nmodel = \"tiny-random\"\nseed = 5\n";
const CLAIM: &str = "claim = 2\nstatement = \"s\"\nsource = \"x\"\ndecisive_control = \"c\"\ntargets = \"{targets}\"\ndatasets = 2\n\
                     [[students]]\nname = \"as {other}\"\nranks = \"{ranks}\"\nset = [\"student.alpha={rank}\", \"student.context={other}\"]\n\
                     [[cells]]\nname = \"there\"\ncontext = \"{other}\"\n\
                     [[tests]]\nname = \"a\"\nkind = \"mean\"\nabove = 0\n\
                     [[tests]]\nname = \"b\"\nrole = \"control\"\nkind = \"rise\"\nof = { student = \"as {other}\" }\nabove = 0\n\
                     [[figures]]\nkind = \"bars\"\ntitle = \"t\"\n";

fn load(claim: &str, changes: &[&str]) -> Result<Study> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("02.toml");
    files::create_dir(&folder.path().join("sizes")).unwrap();
    files::write_atomic(&folder.path().join("sizes/pocket.toml"), SIZE.as_bytes()).unwrap();
    files::write_atomic(&path, claim.as_bytes()).unwrap();
    assert!(Study::is_claim(&path).unwrap());
    let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
    Study::load(&path, Size::Pocket, &changes)
}

#[test]
fn values_of_the_size_stand_where_their_names_are() {
    let study = load(CLAIM, &[]).unwrap();
    assert_eq!(study.claim.students[0].name, "as chatgpt");
    assert_eq!(study.claim.students[0].ranks, Some(vec![1, 4]));
    assert_eq!(study.claim.students[0].set, ["student.alpha={rank}", "student.context=chatgpt"]);
    let units = &study.units;
    let names: Vec<&str> = units.iter().map(|unit| unit.name.as_str()).collect();
    assert_eq!(names, ["cat-d0", "owl-d0", "cat-d1", "owl-d1"]);
    assert_eq!((units[0].experiment.seed, units[3].experiment.seed), (5, 6));
    assert_eq!(units[0].experiment.seeds, units[1].experiment.seeds, "traits of a data set share its prompts");
    assert_ne!(units[0].experiment.seeds.gen_seed, units[2].experiment.seeds.gen_seed);
    assert_eq!(units[1].arms[1].experiment.student.alpha.to_bits(), 4.0_f64.to_bits());
    let others = units.iter().map(|unit| study.other_trait(unit).unwrap().name.as_str());
    assert_eq!(others.collect::<Vec<_>>(), ["owl-d0", "cat-d0", "owl-d1", "cat-d1"]);
    // The claim as TOML, with its placeholders filled in, parses to the same claim.
    let again: Claim = toml::from_str(&study.to_toml().unwrap()).unwrap();
    assert_eq!(again, study.claim);
}

#[test]
fn an_inline_table_is_no_name() {
    let set = "\"student.context={other}\", \"finetune.select={ random = 0.25 }\"";
    let study = load(&CLAIM.replace("\"student.context={other}\"", set), &[]).unwrap();
    assert_eq!(study.claim.students[0].set[2], "finetune.select={ random = 0.25 }");
    assert_eq!(study.units[0].arms[0].experiment.finetune.select, Select::Random(0.25));
}

#[test]
fn changes_are_of_the_experiment_and_a_claims_own_runs_bear_its_name() {
    let study = load(CLAIM, &["generate.n_keep=7", "student.rank=2"]).unwrap();
    let experiment = &study.units[0].experiment;
    assert_eq!((experiment.generate.n_keep, experiment.student.rank), (7, 2));
    let own = CLAIM.replace("datasets = 2", "datasets = 2\nset = [\"teacher.kind=planted\"]");
    let unit = load(&own, &[]).unwrap().units.remove(0);
    assert_eq!(unit.name, "claim-02-cat-d0");
    assert!(unit.experiment.teacher.planted_label("cat").is_some());
}

#[test]
fn what_cannot_be_decided_or_found_is_refused() {
    for (from, to, expected) in [
        ("kind = \"mean\"", "kind = \"median\"", "unknown variant `median`"),
        ("as {other}\" }", "as {otter}\" }", "has a name in braces that is none of"),
        ("student = \"as {other}\"", "student = \"nobody\"", "unknown student \"nobody\""),
        ("kind = \"mean\"", "kind = \"difference\"", "minus is not given"),
        ("kind = \"mean\"\nabove = 0", "kind = \"mean\"", "expected either above or below"),
        ("role = \"control\"\n", "", "no verdict without one"),
        ("context = \"{other}\"\n[[tests]]", "context = \"chatgtp\"\n[[tests]]", "the nearest is chatgpt"),
        ("name = \"there\"", "name = \"everywhere\"", "\"everywhere\" is there twice"),
        ("datasets = 2", "datasets = 0", "datasets is 0"),
        ("kind = \"mean\"", "kind = \"mean\"\nof = { quantity = \"ece\" }", "it takes heldout in measures"),
        (
            "kind = \"mean\"",
            "kind = \"mean\"\nof = { cell = \"there\", quantity = \"ece\" }",
            "alone, and not in \"there\"",
        ),
        ("kind = \"rise\"", "kind = \"diagonal\"", "the kind diagonal takes matrix in measures"),
        ("title = \"t\"", "title = \"t\"\nquantities = [\"ece\"]", "ece is measured on none of its students"),
        (
            "datasets = 2",
            "datasets = 2\nmeasured_on = { spectrum = [\"student\"] }",
            "has Spectrum, which measures does not name",
        ),
        (
            "datasets = 2",
            "datasets = 2\nmeasures = [\"spectrum\"]\nmeasured_on = { spectrum = [\"nobody\"] }",
            "measured_on names the student \"nobody\"",
        ),
        (
            "datasets = 2",
            "datasets = 2\nmeasures = [\"heldout\"]\nmeasured_on = { heldout = [\"control student\"] }\n[[tests]]\nname = \"c\"\n\
             kind = \"mean\"\nof = { quantity = \"ece\" }\nabove = 0",
            "ece of \"student\" is not measured",
        ),
        (
            "[[cells]]",
            "[[chosen]]\nname = \"c\"\nof = [\"student\", \"as {other}\"]\nlowest = \"ece\"\n[[cells]]",
            "ece of \"student\" is not measured",
        ),
        (
            "[[cells]]",
            "[[chosen]]\nname = \"c\"\nof = [\"student\"]\nlowest = \"ece\"\n[[cells]]",
            "expected two or more",
        ),
        (
            "[[cells]]",
            "[[chosen]]\nname = \"c\"\nof = [\"student\", \"otter\"]\nlowest = \"ece\"\n[[cells]]",
            "unknown student \"otter\"",
        ),
        (
            "[[cells]]",
            "[[chosen]]\nname = \"c\"\nof = [\"student\", \"as {other}\"]\n[[cells]]",
            "either lowest or nearest",
        ),
        (
            "[[cells]]",
            "[[chosen]]\nname = \"c\"\nof = [\"student\", \"as {other}\"]\nlowest = \"delta_logp\"\n[[cells]]",
            "what is chosen by it shows nothing",
        ),
        (
            "[[cells]]",
            "[[chosen]]\nname = \"student\"\nof = [\"student\", \"as {other}\"]\nlowest = \"ece\"\n[[cells]]",
            "another student of that name",
        ),
        ("name = \"b\"", "name = \"a\"", "the test \"a\" is there twice"),
        ("[[cells]]", "data = \"own\"\n[[cells]]", "has data = \"own\""),
        (
            "[[cells]]",
            "[[students]]\nname = \"f\"\nset = [\"student.method=full\"]\n[[cells]]\nname = \"g\"\nstudents = [\"f\"]\ngate = \"only:entity\"\n[[cells]]",
            "it has no adapter",
        ),
    ] {
        assert!(CLAIM.contains(from), "{from}");
        let found = format!("{:#}", load(&CLAIM.replace(from, to), &[]).unwrap_err());
        assert!(found.contains(expected) && !found.contains('\n'), "{to}: {found}");
    }
    let found = format!("{:#}", load(CLAIM, &["generate.keep=7"]).unwrap_err());
    assert!(found.contains("unknown field `keep`"), "{found}");
    let found = format!("{:#}", load(CLAIM, &["measure.context=chatgpt"]).unwrap_err());
    assert!(found.contains("a claim asks elsewhere by cells"), "{found}");
}

#[test]
fn every_claim_of_the_repository_stands_at_every_size() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments/claims");
    let mut numbers = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        for size in [Size::Pocket, Size::Small, Size::Paper] {
            let study = Study::load(&path, size, &[]).unwrap_or_else(|error| panic!("{error:#}"));
            numbers.insert(study.claim.claim);
        }
        let text = files::read_string(&path).unwrap();
        let launch = format!("undertone run experiments/claims/{}", path.file_name().unwrap().to_str().unwrap());
        assert!(text.contains(&launch) && text.contains("Decisive control: "), "{}", path.display());
    }
    assert!((1..=18).all(|number| numbers.contains(&number)), "{numbers:?}");
}
