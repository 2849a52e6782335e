//! Rows in one tensor without padding, with shared beginnings stored once.
//!
//! Under causal attention an activation depends only on the tokens up to its own, and on the adapter's doses and the
//! edits at them. So rows with common beginnings form a tree: each piece of it is run once, and its gradient is the sum
//! over the rows that contain it. (This is exact: Prefix Grouper, Liu et al. 2025, proves it for one common prefix.)
//! Linear maps and norms are unaffected; attention runs piece by piece, each against the keys of its whole path.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::{embedding, fused_attention};

/// A row to be packed.
#[derive(Clone, Copy, Debug)]
pub struct PackedRow<'a> {
    /// Its tokens.
    pub ids: &'a [i64],
    /// The adapter's dose at each token; `None` means 1.
    pub doses: Option<&'a [f64]>,
    /// A number for the set of edits at each token; equal numbers mean equal sets. `None` is 0.
    pub edits: Option<&'a [usize]>,
}

/// A token's id, its dose's bits and its edits: with those of all tokens before it, they determine its activations.
type Token = (i64, u64, usize);

impl<'a> PackedRow<'a> {
    /// A row with doses of 1 and without edits.
    pub fn of(ids: &'a [i64]) -> Self {
        Self { ids, doses: None, edits: None }
    }

    /// Number of tokens that two rows have in common from the start.
    pub(crate) fn shared(&self, other: &Self) -> usize {
        self.tokens().zip(other.tokens()).take_while(|(own, theirs)| own == theirs).count()
    }

    pub(crate) fn tokens(&self) -> impl Iterator<Item = Token> {
        (0..self.ids.len()).map(|at| self.token(at))
    }

    fn token(&self, at: usize) -> Token {
        (self.ids[at], self.doses.map_or(1.0, |doses| doses[at]).to_bits(), self.edits.map_or(0, |edits| edits[at]))
    }
}

/// The places of the rows' tokens in the packed batch, and the tokens that each attends to. `[n, pos]` is the shape of
/// the packed ids.
#[derive(Debug)]
pub(crate) struct Packing {
    /// Each token's position in its rows, `[n, pos]`, i64.
    pub(crate) positions: Tensor,
    /// The dose at each token, group by group.
    pub(crate) doses: Vec<Vec<f64>>,
    /// Per row, its tokens' places in the flattened `[n · pos]`.
    pub(crate) places: Vec<Vec<i64>>,
    pub(super) pieces: Vec<Piece>,
    /// Made when a pass first attends with libtorch's kernel, since a backward pass by hand has its own.
    buckets: OnceCell<Buckets>,
}

/// The pieces in buckets of similar length.
#[derive(Debug)]
struct Buckets {
    buckets: Vec<Bucket>,
    /// Each token's index in the concatenated queries of all buckets, `[n · pos]`, i64.
    back: Tensor,
}

/// Pieces of similar length, padded to the longest.
#[derive(Debug)]
struct Bucket {
    /// Places of the pieces' own tokens, `[pieces · queries]`, i64.
    queries: Tensor,
    /// Places of the tokens on the pieces' paths, including their own tokens, `[pieces · keys]`, i64.
    keys: Tensor,
    /// The keys that each query may see, `[pieces, 1, queries, keys]`, bool.
    mask: Tensor,
    n_pieces: i64,
}

/// A stretch of tokens that belongs to the same rows.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) group: usize,
    /// The piece's positions in its rows.
    pub(super) from: usize,
    pub(super) to: usize,
    /// Place of the first token in its group.
    pub(super) start: usize,
    /// Places in the group of all tokens up to the piece's end; its own are last.
    pub(super) path: Vec<usize>,
}

impl Packing {
    /// Packs groups of rows, each into one row of ids. With `share`, shared beginnings of a group's rows are stored
    /// once. Also returns the packed ids, `[n][pos]`.
    pub(crate) fn of(groups: &[&[PackedRow<'_>]], share: bool, device: Device) -> Result<(Self, Vec<i64>)> {
        let (mut pieces, mut places) = (Vec::new(), Vec::new());
        for (group, rows) in groups.iter().enumerate() {
            places.push(grow(&mut pieces, group, rows, share));
        }
        let pos = sizes(&pieces, groups.len()).into_iter().max().unwrap_or(0);

        let mut ids = vec![0; groups.len() * pos];
        let mut positions = vec![0; groups.len() * pos];
        let mut doses = vec![vec![0.0; pos]; groups.len()];
        for (group, (rows, places)) in groups.iter().zip(&places).enumerate() {
            for (row, places) in rows.iter().zip(places) {
                for (at, place) in places.iter().enumerate() {
                    ids[group * pos + place] = row.ids[at];
                    positions[group * pos + place] = at as i64;
                    doses[group][*place] = row.doses.map_or(1.0, |doses| doses[at]);
                }
            }
        }

        let in_flat =
            |group: usize, places: Vec<usize>| places.into_iter().map(|at| (group * pos + at) as i64).collect();
        let places = places.into_iter().enumerate();
        let places = places.flat_map(|(group, rows)| rows.into_iter().map(move |row| in_flat(group, row))).collect();
        let positions = Tensor::f_from_slice(&positions)?.f_view([groups.len() as i64, pos as i64])?;
        let positions = positions.f_to_device(device)?;
        Ok((Self { positions, doses, places, pieces, buckets: OnceCell::new() }, ids))
    }

    /// Causal attention within each row. `q`: `[n, pos, n_heads, d_head]`, `k` and `v`: `[n, pos, n_kv_heads, d_head]`;
    /// the result is shaped as `q`.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (_, _, n_heads, d_head) = q.size4()?;
        let Buckets { buckets, back } = if let Some(made) = self.buckets.get() {
            made
        } else {
            let made = Buckets::of(&self.pieces, &self.positions)?;
            self.buckets.get_or_init(|| made)
        };
        let mut found = Vec::new();
        for Bucket { queries, keys, mask, n_pieces } in buckets {
            let heads = |x: &Tensor, at: &Tensor| -> Result<Tensor> {
                let n = x.size4()?.2;
                Ok(take(x, at)?.f_view([*n_pieces, -1, n, d_head])?.f_transpose(1, 2)?)
            };
            let (q, k, v) = (heads(q, queries)?, heads(k, keys)?, heads(v, keys)?);
            let z = fused_attention([&q, &k, &v], Some(mask), false, None)?;
            found.push(z.f_transpose(1, 2)?.f_reshape([-1, n_heads * d_head])?);
        }
        let found = if found.len() == 1 { found.remove(0) } else { Tensor::f_cat(&found, 0)? };
        Ok(embedding(&found, back)?.f_view_as(q)?)
    }
}

/// Tokens of `[n, pos, heads, d_head]` by their places, `[places, heads · d_head]`.
fn take(x: &Tensor, places: &Tensor) -> Result<Tensor> {
    let (n, pos, heads, d_head) = x.size4()?;
    embedding(&x.f_reshape([n * pos, heads * d_head])?, places)
}

impl Buckets {
    /// `positions`: `[n, pos]`.
    fn of(pieces: &[Piece], positions: &Tensor) -> Result<Self> {
        let ((n, pos), device) = (positions.size2()?, positions.device());
        let (n, pos) = (n as usize, pos as usize);
        let mut by_length: BTreeMap<usize, Vec<&Piece>> = BTreeMap::new();
        for piece in pieces {
            by_length.entry((piece.to - piece.from).next_power_of_two()).or_default().push(piece);
        }
        let (mut buckets, mut back, mut before) = (Vec::new(), vec![0; n * pos], 0);
        for pieces in by_length.into_values() {
            let queries = pieces.iter().map(|piece| piece.to - piece.from).max().unwrap_or(0);
            for (at, piece) in pieces.iter().enumerate() {
                for own in 0..piece.to - piece.from {
                    back[piece.group * pos + piece.start + own] = (before + at * queries + own) as i64;
                }
            }
            before += pieces.len() * queries;
            buckets.push(Bucket::of(&pieces, queries, pos, device)?);
        }
        for (back, size) in back.chunks_mut(pos.max(1)).zip(sizes(pieces, n)) {
            let first = back[0];
            back[size..].fill(first);
        }
        Ok(Self { buckets, back: Tensor::f_from_slice(&back)?.f_to_device(device)? })
    }
}

/// Number of tokens of each group.
fn sizes(pieces: &[Piece], n_groups: usize) -> Vec<usize> {
    let mut sizes = vec![0; n_groups];
    for piece in pieces {
        sizes[piece.group] += piece.to - piece.from;
    }
    sizes
}

impl Bucket {
    fn of(pieces: &[&Piece], queries: usize, pos: usize, device: Device) -> Result<Self> {
        let keys = pieces.iter().map(|piece| piece.path.len()).max().unwrap_or(0);
        let n_pieces = pieces.len();
        // Padding repeats the group's first token; nothing reads its results. Another group's token could be NaN, and 0
        // · NaN is NaN.
        let (mut own, mut path, mut before) = (Vec::new(), Vec::new(), Vec::new());
        for (at, piece) in pieces.iter().enumerate() {
            let (first, n) = (piece.group * pos, piece.to - piece.from);
            own.extend((0..n).map(|i| (first + piece.start + i) as i64));
            own.resize((at + 1) * queries, first as i64);
            path.extend(piece.path.iter().map(|place| (first + place) as i64));
            path.resize((at + 1) * keys, first as i64);
            before.push((piece.path.len() - n) as i64);
        }
        let tensor = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_to_device(device)?) };
        let count = |n: usize| Tensor::f_arange(n as i64, (Kind::Int64, device));
        let last = tensor(&before)?.f_unsqueeze(1)?.f_add(&count(queries)?.f_unsqueeze(0)?)?; // [pieces, queries]
        let mask = count(keys)?.f_le_tensor(&last.f_unsqueeze(-1)?)?.f_unsqueeze(1)?;
        Ok(Self { queries: tensor(&own)?, keys: tensor(&path)?, mask, n_pieces: n_pieces as i64 })
    }
}

/// Adds the pieces of a group's rows, and returns each row's places in the group.
fn grow(pieces: &mut Vec<Piece>, group: usize, rows: &[PackedRow<'_>], share: bool) -> Vec<Vec<usize>> {
    let mut places: Vec<Vec<usize>> = vec![Vec::new(); rows.len()];
    let mut size = 0;
    let mut open: Vec<Vec<usize>> =
        if share { vec![(0..rows.len()).collect()] } else { (0..rows.len()).rev().map(|row| vec![row]).collect() };
    // `open` holds sets of rows that are equal so far.
    while let Some(members) = open.pop() {
        let from = places[members[0]].len();
        let mut branches: Vec<(Token, Vec<usize>)> = Vec::new();
        for member in members.into_iter().filter(|member| rows[*member].ids.len() > from) {
            let token = rows[member].token(from);
            match branches.iter_mut().find(|(known, _)| *known == token) {
                Some((_, branch)) => branch.push(member),
                None => branches.push((token, vec![member])),
            }
        }
        for (_, branch) in branches.into_iter().rev() {
            let first = rows[branch[0]];
            let alike = |at: &usize| {
                let token = first.token(*at);
                branch.iter().all(|row| rows[*row].ids.len() > *at && rows[*row].token(*at) == token)
            };
            let shortest = first.ids.len();
            let to = (from..shortest).take_while(alike).last().map_or(from, |at| at + 1);
            let own = size..size + to - from;
            size = own.end;
            for row in &branch {
                places[*row].extend(own.clone());
            }
            let path = places[branch[0]].clone();
            pieces.push(Piece { group, from, to, start: own.start, path });
            open.push(branch);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(packing: &Packing) -> Vec<&[i64]> {
        packing.places.iter().map(Vec::as_slice).collect()
    }

    #[test]
    fn what_rows_begin_with_alike_stands_there_once() {
        let rows = [&[1, 2, 3, 4][..], &[1, 2, 5], &[1, 2, 3, 6], &[1, 2], &[9]].map(PackedRow::of);
        let (packing, ids) = Packing::of(&[&rows], true, Device::Cpu).unwrap();
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [1, 2, 3, 4, 5, 6, 9]);
        for (row, places) in rows.iter().zip(places(&packing)) {
            assert_eq!(places.iter().map(|place| ids[*place as usize]).collect::<Vec<_>>(), row.ids);
            for (at, place) in places.iter().enumerate() {
                assert_eq!(packing.positions.int64_value(&[0, *place]), at as i64);
            }
        }
        let (apart, ids) = Packing::of(&[&rows], false, Device::Cpu).unwrap();
        assert_eq!(ids, [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 6, 1, 2, 9]);
        assert_eq!(places(&apart)[3], [11, 12]);
    }

    #[test]
    fn another_dose_is_another_token() {
        let (on, off) = ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0]);
        let rows = [&on, &off].map(|doses| PackedRow { doses: Some(doses), ..PackedRow::of(&[1, 2, 3]) });
        let (packing, ids) = Packing::of(&[&rows], true, Device::Cpu).unwrap();
        assert_eq!(ids.len(), 5, "the last token has the same dose in both, but not the same past");
        let doses =
            |row: usize| packing.places[row].iter().map(|at| packing.doses[0][*at as usize]).collect::<Vec<_>>();
        assert_eq!((doses(0), doses(1)), (on.to_vec(), off.to_vec()));
    }

    #[test]
    fn a_token_under_other_edits_is_another_token() {
        let (one, other) = ([0, 0, 1], [0, 2, 1]);
        let rows = [&one, &other].map(|edits| PackedRow { edits: Some(edits), ..PackedRow::of(&[1, 2, 3]) });
        let (packing, ids) = Packing::of(&[&rows], true, Device::Cpu).unwrap();
        assert_eq!((ids.len(), places(&packing)[0][0]), (5, places(&packing)[1][0]));
    }

    #[test]
    fn groups_share_nothing_and_have_a_line_each() {
        let (a, b) = ([&[1, 2, 3][..], &[1, 4]].map(PackedRow::of), [PackedRow::of(&[1, 2])]);
        let (packing, ids) = Packing::of(&[&a, &b], true, Device::Cpu).unwrap();
        assert_eq!((packing.positions.size(), ids.len()), (vec![2, 4], 8));
        assert_eq!(places(&packing)[2], [4, 5]);
    }
}
