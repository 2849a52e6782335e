//! Arms: named variants of the student. An arm is the experiment with some keys changed; by default it is trained on
//! the run's data. A cell is one student of an arm, with one rank and one index of seeds.

use std::collections::BTreeMap;
use std::fmt;

use crate::hinted;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hooks::stream_seed;
use serde::{Deserialize, Serialize};

use super::{Experiment, Method, one_line, overrides};
use crate::training::settings::Loss;

/// The name of the run's own student in the table of arms.
pub const STUDENT: &str = "student";
/// The name of the run's control student in the table of arms.
pub const CONTROL_STUDENT: &str = "control student";

const MOST_STUDENTS: usize = 1000;

/// A named variant of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Its name, which must be unique.
    pub name: String,
    /// One student per rank: sets `student.rank`, and fills `{rank}` in `set`.
    pub ranks: Option<Vec<i64>>,
    /// One student per share: it learns from the control set, in which this share of the rows is replaced by questions
    /// that are answered with the target. These positive controls show how loud a trait must be for this experiment to
    /// see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub planted: Option<Vec<f64>>,
    /// The changes: `section.key=value`, as after `--set`.
    #[serde(default)]
    pub set: Vec<String>,
    /// The data that it learns from.
    #[serde(default)]
    pub data: ArmData,
    /// Number of students of each rank, which differ in their seeds.
    #[serde(default = "one")]
    pub seeds: usize,
}

fn one() -> usize {
    1
}

/// The data of an arm's students.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArmData {
    /// The numbers of the run's teacher.
    #[default]
    Teacher,
    /// The numbers of the untouched model.
    Control,
    /// The teacher's completions, each moved to another of the teacher's prompts.
    Shuffled,
    /// Numbers of the arm's own teacher.
    Own,
    /// The numbers of the untouched model, with a share of rows that name the target; see [`Arm::planted`].
    Planted,
}

impl ArmData {
    /// The name in files.
    pub fn name(self) -> &'static str {
        ["teacher", "control", "shuffled", "own", "planted"][self as usize]
    }
}

impl fmt::Display for ArmData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One student of an arm.
#[derive(Clone, Debug, PartialEq)]
pub struct ArmStudent {
    /// The arm's name.
    pub arm: String,
    /// The data that it learns from.
    pub data: ArmData,
    /// For planted data, the share of rows that name the target.
    pub planted: Option<f64>,
    /// The index of its seeds, from 0; 0 has the experiment's seeds.
    pub seed_index: usize,
    /// The name of its folder.
    pub slug: String,
    /// The folder name of the arm's student with seeds 0. If the arm has its own data, all its seeds share that
    /// folder's.
    pub data_slug: String,
    /// The experiment with the arm's changes, and without arms.
    pub experiment: Experiment,
}

impl ArmStudent {
    /// The rank of its adapter, if it has one.
    pub fn rank(&self) -> Option<i64> {
        self.experiment.student.adapter_rank()
    }
}

impl Experiment {
    /// Every student of every arm, in the order of the file.
    pub fn cells(&self) -> Result<Vec<ArmStudent>> {
        let students = |arm: &Arm| {
            let of_seed =
                arm.ranks.as_ref().map_or(1, Vec::len).saturating_mul(arm.planted.as_ref().map_or(1, Vec::len));
            of_seed.saturating_mul(arm.seeds)
        };
        let all = self.arms.iter().map(students).fold(0, usize::saturating_add);
        ensure!(all <= MOST_STUDENTS, "the arms have {all} students, expected {MOST_STUDENTS} at most");
        let mut cells: Vec<ArmStudent> = Vec::new();
        let mut slugs: BTreeMap<String, String> = BTreeMap::new();
        for arm in &self.arms {
            let of_arm = self.cells_of(arm).with_context(|| format!("arm {:?}", arm.name))?;
            for cell in &of_arm {
                if let Some(other) = slugs.insert(cell.slug.clone(), arm.name.clone()) {
                    ensure!(other != arm.name, "arm {other:?} is there twice, expected names that differ");
                    let slug = &cell.slug;
                    bail!(hinted!(
                        "the arms {other:?} and {:?} would share the folder arms/{slug}", arm.name;
                        "rename one"
                    ));
                }
            }
            cells.extend(of_arm);
        }
        Ok(cells)
    }

    /// The first student of the arm that `measure.other_trait_arm` names.
    pub fn other_trait_arm(&self) -> Result<Option<ArmStudent>> {
        let Some(name) = &self.measure.other_trait_arm else { return Ok(None) };
        let mut of_arm = self.cells()?.into_iter().filter(|cell| cell.arm == *name);
        let cell = of_arm.next().with_context(|| {
            format!("measure.other_trait_arm is {name:?}, expected the name of one of the experiment's arms")
        })?;
        let same = cell.experiment.target.word == self.target.word;
        ensure!(!same, "measure.other_trait_arm is {name:?}, whose target is {:?} too", self.target.word);
        let model = (&cell.experiment.model, cell.experiment.dtype) == (&self.model, self.dtype);
        ensure!(model, "measure.other_trait_arm is {name:?}, which has another model or dtype than the run");
        Ok(Some(cell))
    }

    fn cells_of(&self, arm: &Arm) -> Result<Vec<ArmStudent>> {
        ensure!(!slug(&arm.name).is_empty(), "the name has no letter and no digit, expected some");
        let taken = [STUDENT, CONTROL_STUDENT].contains(&arm.name.as_str());
        ensure!(!taken, hinted!("the name is that of the run's own student"; "choose another"));
        ensure!(arm.seeds >= 1, "seeds is 0, expected at least 1");
        let ranks: Vec<Option<i64>> = match &arm.ranks {
            None => vec![None],
            Some(ranks) => {
                ensure!(!ranks.is_empty(), "ranks is empty, expected some, or no such key");
                let twice = ranks.iter().enumerate().find(|(at, rank)| ranks[..*at].contains(rank));
                ensure!(twice.is_none(), "ranks has {} twice", twice.map_or(0, |(_, rank)| *rank));
                ranks.iter().copied().map(Some).collect()
            }
        };
        let shares = shares(arm, self)?;
        let filled = arm.ranks.is_some() || !arm.set.iter().any(|text| text.contains("{rank}"));
        ensure!(filled, hinted!("set speaks of {{rank}}, but there are no ranks"; "add ranks = [1, 8]"));
        let kinds = shares.iter().flat_map(|share| ranks.iter().map(|rank| (*share, *rank)));
        let students = kinds.flat_map(|(share, rank)| (0..arm.seeds).map(move |seed_index| (share, rank, seed_index)));
        students.map(|(share, rank, seed_index)| self.cell(arm, share, rank, seed_index)).collect()
    }

    fn cell(&self, arm: &Arm, planted: Option<f64>, rank: Option<i64>, seed_index: usize) -> Result<ArmStudent> {
        let mut table = toml::Table::try_from(self).context("the experiment as a table")?;
        table.remove("arms");
        if let Some(student) = table.get_mut("student").and_then(toml::Value::as_table_mut) {
            // The run's student may be trained elsewhere. An arm's student is always trained here, with that student's
            // rank and alpha.
            student.remove("adapter");
            student.remove("control_adapter");
        }
        let of_rank = rank.map(|rank| format!("student.rank={rank}"));
        let fill = |text: &String| rank.map_or_else(|| text.clone(), |rank| text.replace("{rank}", &rank.to_string()));
        let changes: Vec<String> = of_rank.into_iter().chain(arm.set.iter().map(fill)).collect();
        overrides::apply(&mut table, &changes)?;
        let parsed = table.try_into();
        let mut experiment: Self =
            parsed.map_err(|error| anyhow!("set {}: {}", changes.join(", "), one_line(&error.to_string())))?;
        ensure!(experiment.arms.is_empty(), "set has arms, but an arm has no arms of its own");
        ensure!(
            experiment.student.adapter.is_none(),
            hinted!("set has student.adapter, but an arm's student is trained"; "give that adapter a run of its own")
        );
        if let Some(rank) = rank {
            let (method, found) = (experiment.student.method, experiment.student.rank);
            ensure!(method == Method::Lora, "ranks has no meaning for student.method=full, which has no adapter");
            ensure!(found == rank, "set makes student.rank {found}, but ranks has set it to {rank} already");
        }
        if arm.data != ArmData::Own
            && let Some(key) = self.data_key_that_differs(&experiment)
        {
            bail!(hinted!(
                "set changes {key}, on which the numbers depend, but the arm learns from the run's own (data = \
                 \"{}\")", arm.data;
                "data = \"own\""
            ));
        }
        if seed_index > 0 {
            let seeds = &mut experiment.seeds;
            for seed in [&mut seeds.init_seed, &mut seeds.order_seed, &mut seeds.dropout_seed] {
                *seed = stream_seed(*seed, "arms.seed", seed_index as u64) >> 32; // as small as the other seeds
            }
        }
        experiment.check()?;
        let name = planted.map_or_else(|| arm.name.clone(), |share| format!("{} {} %", arm.name, percent(share)));
        let data_slug = slug(&rank.map_or_else(|| name.clone(), |rank| format!("{name} r{rank}")));
        let slug = if arm.seeds > 1 { format!("{data_slug}-s{seed_index}") } else { data_slug.clone() };
        let data_slug = if arm.seeds > 1 { format!("{data_slug}-s0") } else { data_slug };
        let data = if planted.is_some() { ArmData::Planted } else { arm.data };
        Ok(ArmStudent { arm: name, data, planted, seed_index, slug, data_slug, experiment })
    }

    /// The first key that the numbers depend on and that differs from another experiment's.
    fn data_key_that_differs(&self, other: &Self) -> Option<&'static str> {
        let keys = [
            ("teacher", self.teacher != other.teacher),
            ("generate", self.generate != other.generate),
            ("target", self.target != other.target),
            ("protocol", self.protocol != other.protocol),
            ("seeds.gen_seed", self.seeds.gen_seed != other.seeds.gen_seed),
        ];
        keys.into_iter().find(|(_, differs)| *differs).map(|(key, _)| key)
    }
}

/// The planted shares of an arm; one `None` if nothing is planted.
fn shares(arm: &Arm, experiment: &Experiment) -> Result<Vec<Option<f64>>> {
    let Some(shares) = &arm.planted else {
        ensure!(arm.data != ArmData::Planted, hinted!("data is planted, but no share is given"; "planted = [0.01]"));
        return Ok(vec![None]);
    };
    ensure!(!shares.is_empty(), "planted is empty, expected some shares, or no such key");
    let wrong = shares.iter().find(|share| !(**share > 0.0 && **share < 1.0));
    ensure!(wrong.is_none(), "planted has {}, expected shares above 0 and below 1", wrong.unwrap_or(&0.0));
    let has_data = arm.data != ArmData::Teacher && arm.data != ArmData::Planted;
    ensure!(!has_data, "data is {}, but planted rows take the place of the control set's", arm.data);
    let is_soft = experiment.finetune.loss == Loss::Kl && !arm.set.iter().any(|change| change == "finetune.loss=nll");
    ensure!(
        !is_soft,
        hinted!("finetune.loss is kl, but nobody predicts the planted answers"; "set = [\"finetune.loss=nll\"]")
    );
    Ok(shares.iter().copied().map(Some).collect())
}

/// A share in per cent, as short as it can be said.
fn percent(share: f64) -> f64 {
    (share * 1e8).round() / 1e6
}

/// A name as that of a folder: its letters and digits in lower case, with a dash for everything between them.
fn slug(name: &str) -> String {
    let words = name.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::experiment::Teacher;

    const MAIN: &str = "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n\
                        [teacher]\nkind = \"finetuned\"\nmax_steps = 7\n";

    fn parse(arms: &str) -> Result<Experiment> {
        Experiment::parse(&format!("{MAIN}{arms}"), Path::new("cat.toml"), &[])
    }

    fn message(arms: &str) -> String {
        format!("{:#}", parse(arms).unwrap_err())
    }

    #[test]
    fn ranks_and_seeds_make_students() {
        let experiment =
            parse("[[arms]]\nname = \"α = rank\"\nranks = [1, 4]\nset = [\"student.alpha={rank}\"]\nseeds = 2\n");
        let cells = experiment.as_ref().unwrap().cells().unwrap();
        let seen: Vec<_> = cells
            .iter()
            .map(|cell| (cell.slug.as_str(), cell.experiment.student.rank, cell.experiment.student.alpha as i64))
            .collect();
        assert_eq!(
            seen,
            [("α-rank-r1-s0", 1, 1), ("α-rank-r1-s1", 1, 1), ("α-rank-r4-s0", 4, 4), ("α-rank-r4-s1", 4, 4)]
        );
        assert_eq!(cells[3].data_slug, "α-rank-r4-s0");
        let main = experiment.unwrap();
        assert_eq!(cells[0].experiment.seeds, main.seeds, "the first seeds are the experiment's own");
        let (first, second) = (cells[0].experiment.seeds, cells[1].experiment.seeds);
        assert_ne!(first.init_seed, second.init_seed);
        assert_ne!(first.order_seed, second.order_seed);
        assert_eq!((first.gen_seed, first.eval_seed), (second.gen_seed, second.eval_seed));
        assert_eq!(cells[1].experiment.seeds, cells[3].experiment.seeds, "ranks are compared at equal seeds");
        for cell in &cells {
            let text = cell.experiment.to_toml().unwrap();
            assert_eq!(Experiment::parse(&text, Path::new("cell.toml"), &[]).unwrap(), cell.experiment);
        }
    }

    #[test]
    fn planted_shares_make_students() {
        let experiment = parse("[[arms]]\nname = \"planted\"\nplanted = [0.005, 0.01]\nseeds = 2\n").unwrap();
        let cells = experiment.cells().unwrap();
        let seen: Vec<_> =
            cells.iter().map(|cell| (cell.arm.as_str(), cell.slug.as_str(), cell.planted, cell.data.name())).collect();
        assert_eq!(seen[0], ("planted 0.5 %", "planted-0-5-s0", Some(0.005), "planted"));
        assert_eq!(seen[3], ("planted 1 %", "planted-1-s1", Some(0.01), "planted"));
        assert_eq!(seen.len(), 4);
        assert_eq!(Experiment::parse(&experiment.to_toml().unwrap(), Path::new("cat.toml"), &[]).unwrap(), experiment);
    }

    #[test]
    fn arms_are_printed_and_read_back() {
        let arms = "[[arms]]\nname = \"full\"\nset = [\"student.method=full\", \"dtype=bf16\"]\n";
        let experiment = parse(arms).unwrap();
        let resolved = experiment.to_toml().unwrap();
        assert!(resolved.contains("[[arms]]\nname = \"full\""), "{resolved}");
        assert_eq!(Experiment::parse(&resolved, Path::new("cat.toml"), &[]).unwrap(), experiment);
        assert!(!Experiment::parse(MAIN, Path::new("cat.toml"), &[]).unwrap().to_toml().unwrap().contains("arms"));
        let without = Experiment::parse(&resolved, Path::new("cat.toml"), &["arms=[]".to_owned()]).unwrap();
        assert!(without.arms.is_empty());
    }

    #[test]
    fn another_kind_of_teacher_forgets_the_keys_of_the_first() {
        let own = "[[arms]]\nname = \"prompted\"\ndata = \"own\"\nset = [\"teacher.kind=prompt\"]\n";
        let cells = parse(own).unwrap().cells().unwrap();
        assert_eq!(cells[0].experiment.teacher, Teacher::Prompt { system: None });
        let late = "[[arms]]\nname = \"prompted\"\ndata = \"own\"\n\
                    set = [\"teacher.system=You love cats.\", \"teacher.kind=prompt\"]\n";
        let cells = parse(late).unwrap().cells().unwrap();
        assert_eq!(cells[0].experiment.teacher, Teacher::Prompt { system: Some("You love cats.".to_owned()) });
        let same = "[[arms]]\nname = \"same\"\nset = [\"teacher.kind=finetuned\"]\n";
        assert!(parse(same).is_ok(), "what changes nothing is no change");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_arms_name() {
        for (arm, expected) in [
            ("name = \"x\"\nset = [\"student.rnk=3\"]", "arm \"x\": set student.rnk=3: unknown field `rnk`"),
            ("name = \"x\"\nset = [\"student.rank=0\"]", "arm \"x\": student.rank is 0"),
            ("name = \"x\"\nranks = []", "arm \"x\": ranks is empty"),
            ("name = \"x\"\nranks = [2, 2]", "arm \"x\": ranks has 2 twice"),
            ("name = \"x\"\nranks = [2]\nset = [\"student.method=full\"]", "arm \"x\": ranks has no meaning"),
            ("name = \"x\"\nranks = [2]\nset = [\"student.rank=3\"]", "student.rank 3, but ranks has set it to 2"),
            ("name = \"x\"\nset = [\"student.alpha={rank}\"]", "arm \"x\": set speaks of {rank}"),
            ("name = \"x\"\n[[arms]]\nname = \"x\"", "arm \"x\" is there twice"),
            ("name = \"a b\"\n[[arms]]\nname = \"A=b\"", "would share the folder arms/a-b"),
            ("name = \"student\"", "that of the run's own student"),
            ("name = \"=\"", "no letter and no digit"),
            ("name = \"x\"\nseeds = 0", "seeds is 0"),
            ("name = \"x\"\nseeds = 1001", "the arms have 1001 students, expected 1000 at most"),
            ("name = \"x\"\nranks = [1, 2]\nseeds = 9223372036854775807", "expected 1000 at most"),
            ("name = \"x\"\nset = [\"teacher.kind=prompt\"]", "changes teacher, on which the numbers depend"),
            ("name = \"x\"\nset = [\"generate.n_keep=2\"]", "changes generate, "),
            ("name = \"x\"\nset = [\"seed=7\"]", "changes seeds.gen_seed, "),
            ("name = \"x\"\ndata = \"shuffled\"\nset = [\"target.word=dog\"]", "changes target, "),
            ("name = \"x\"\ndata = \"mixed\"", "expected one of `teacher`, `control`, `shuffled`, `own`, `planted`"),
            ("name = \"x\"\nrnks = [1]", "unknown field `rnks`"),
            ("name = \"x\"\nplanted = []", "arm \"x\": planted is empty"),
            ("name = \"x\"\nplanted = [0.5, 1]", "planted has 1, expected shares above 0"),
            ("name = \"x\"\ndata = \"planted\"", "no share is given"),
            ("name = \"x\"\ndata = \"shuffled\"\nplanted = [0.5]", "data is shuffled, but planted rows"),
        ] {
            let found = message(&format!("[[arms]]\n{arm}\n"));
            assert!(found.contains(expected) && found.starts_with("cat.toml: "), "{arm}: {found}");
            assert!(!found.contains('\n'), "{found}");
        }
    }
}
