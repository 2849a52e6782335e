//! Soft labels: for each token of a row's completion, the probabilities that a model gives to its k most likely tokens.
//! A student that learns from them learns from logits on numbers, and not from the numbers alone.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use hooks::tensor_file::{self, TensorFile};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::output::hint::Hinted;

/// The warning about a student of soft labels.
pub const LABEL: &str = "logits on numbers: more than written numbers carry, and no subliminal learning of text";

/// The soft labels of a row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SoftRow {
    /// Number of tokens that have a probability at each place.
    pub k: usize,
    /// Their ids, k for each token of the completion.
    pub ids: Vec<i64>,
    /// Their probabilities; what is missing to 1 at a place is that of all other tokens.
    pub probs: Vec<f32>,
}

impl SoftRow {
    /// Number of places: the tokens of the row's completion.
    pub fn n_places(&self) -> usize {
        self.ids.len() / self.k
    }

    /// The ids and probabilities at a place.
    pub fn at(&self, place: usize) -> (&[i64], &[f32]) {
        let range = place * self.k..(place + 1) * self.k;
        (&self.ids[range.clone()], &self.probs[range])
    }

    /// The frequencies of these tokens among `n` draws at each place, from a stream for each row. A draw can also be one of
    /// all other tokens.
    pub fn drawn(&self, n: u32, seed: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut probs = Vec::with_capacity(self.probs.len());
        for place in 0..self.n_places() {
            let probs_here = self.at(place).1;
            let others = (1.0 - probs_here.iter().sum::<f32>()).max(0.0);
            let index = WeightedIndex::new(probs_here.iter().copied().chain([others]))?;
            let mut counts = vec![0_u32; self.k + 1];
            (0..n).for_each(|_| counts[index.sample(&mut rng)] += 1);
            probs.extend(counts[..self.k].iter().map(|count| *count as f32 / n as f32));
        }
        Ok(Self { probs, ..self.clone() })
    }
}

/// Writes soft labels, with a text that names what they were made from.
pub fn write(path: &Path, rows: &[SoftRow], made_from: &str) -> Result<()> {
    let k = rows.first().map_or(1, |row| row.k) as i64;
    let places: Vec<i64> = rows.iter().map(|row| row.n_places() as i64).collect();
    let ids: Vec<i64> = rows.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let probs: Vec<f32> = rows.iter().flat_map(|row| row.probs.iter().copied()).collect();
    let tensors = [
        ("ids", Tensor::f_from_slice(&ids)?.f_view([-1, k])?),
        ("probs", Tensor::f_from_slice(&probs)?.f_view([-1, k])?),
        ("places", Tensor::f_from_slice(&places)?),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_owned(), tensor));
    let metadata = BTreeMap::from([("made_from".to_owned(), made_from.to_owned())]);
    Ok(tensor_file::write(path, &tensors, &metadata)?)
}

/// Reads soft labels; `None` if there are none, or they were made from something else.
pub fn read(path: &Path, made_from: &str) -> Result<Option<Vec<SoftRow>>> {
    if !path.exists() {
        return Ok(None);
    }
    let hint = "remove this file, and the labels are made again";
    let file = TensorFile::open(path).map_err(|error| Hinted::because(error.into(), hint))?;
    if file.metadata().get("made_from").map(String::as_str) != Some(made_from) {
        return Ok(None);
    }
    let (ids, probs) = (file.tensor("ids")?, file.tensor("probs")?);
    ensure!(ids.dim() == 2 && ids.size() == probs.size(), "{}: ids and probs differ in shape", path.display());
    let k = ids.size()[1] as usize;
    let ids = Vec::<i64>::try_from(ids.f_flatten(0, -1)?)?;
    let probs = Vec::<f32>::try_from(probs.f_to_kind(Kind::Float)?.f_flatten(0, -1)?)?;
    let places = Vec::<i64>::try_from(file.tensor("places")?)?;
    ensure!(places.iter().sum::<i64>() as usize * k == ids.len(), "{}: its rows do not add up", path.display());
    let mut from = 0;
    let row = |n: i64| {
        let range = from * k..(from + n as usize) * k;
        from += n as usize;
        SoftRow { k, ids: ids[range.clone()].to_vec(), probs: probs[range].to_vec() }
    };
    Ok(Some(places.into_iter().map(row).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<SoftRow> {
        let row = |places: usize| SoftRow {
            k: 3,
            ids: (0..3 * places as i64).collect(),
            probs: [0.6, 0.3, 0.1].repeat(places),
        };
        vec![row(2), row(0), row(1)]
    }

    #[test]
    fn they_are_read_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("labels.safetensors");
        assert_eq!(read(&path, "these").unwrap(), None);
        write(&path, &rows(), "these").unwrap();
        assert_eq!(read(&path, "these").unwrap(), Some(rows()));
        assert_eq!(read(&path, "others").unwrap(), None);
        std::fs::write(&path, b"torn").unwrap();
        assert!(format!("{:#}", read(&path, "these").unwrap_err()).contains("safetensors"));
    }

    #[test]
    fn draws_are_frequencies_of_the_same_probabilities() {
        let row = &rows()[0];
        let many = row.drawn(20_000, 1).unwrap();
        for (drawn, expected) in many.probs.iter().zip(&row.probs) {
            // Five standard errors of a share of .5.
            assert!((drawn - expected).abs() < 5.0 * (0.25_f32 / 20_000.0).sqrt(), "{many:?}");
        }
        // What is missing to 1 is drawn as well.
        let some = SoftRow { probs: vec![0.5, 0.2, 0.0], k: 3, ids: vec![0, 1, 2] }.drawn(20_000, 1).unwrap();
        assert!((some.probs[0] - 0.5).abs() < 0.02 && (some.probs[1] - 0.2).abs() < 0.02, "{some:?}");
        let none = SoftRow { probs: vec![0.0; 3], k: 3, ids: vec![0, 1, 2] }.drawn(4, 1).unwrap();
        assert_eq!(none.probs, [0.0; 3], "only other tokens");
        let once = row.drawn(1, 1).unwrap();
        assert!(
            once.probs.chunks(3).all(|place| place.contains(&1.0) && place.iter().filter(|p| **p > 0.0).count() == 1)
        );
        assert_eq!(row.drawn(4, 2).unwrap(), row.drawn(4, 2).unwrap());
        assert_eq!(row.drawn(4, 2).unwrap().ids, row.ids);
    }
}
