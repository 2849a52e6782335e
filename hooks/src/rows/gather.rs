//! The rows that attention by hand takes from a packed batch's queries, keys and values, head by head, so that one call
//! gathers all heads of all pieces in the order in which batched products take them.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::ops::embedding;
use crate::rows::packing::{Packing, Piece};

/// Buckets are merged if this is all that their padding adds: pairs of a query and a key times the heads' common width. A
/// bucket costs some 50 µs of calls in a forward and backward pass, in which a core does as much arithmetic.
const FEW: usize = 200_000;

/// Rows taken by index.
#[derive(Debug)]
pub(crate) struct Gather {
    /// The row taken at each place, `[taken]`, i64.
    index: Tensor,
    /// The places that each row was taken to, row by row, `[taken]`, and where a row's places begin, `[rows + 1]`, i64.
    places: Tensor,
    starts: Tensor,
}

impl Gather {
    fn of(index: &[usize], n_rows: usize, device: Device) -> Result<Self> {
        let mut starts = vec![0_i64; n_rows + 1];
        for row in index {
            starts[row + 1] += 1;
        }
        for row in 0..n_rows {
            starts[row + 1] += starts[row];
        }
        let (mut next, mut places) = (starts.clone(), vec![0_i64; index.len()]);
        for (place, row) in index.iter().enumerate() {
            places[next[*row] as usize] = place as i64;
            next[*row] += 1;
        }
        let index: Vec<i64> = index.iter().map(|row| *row as i64).collect();
        let tensor = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(device);
        Ok(Self { index: tensor(&index)?, places: tensor(&places)?, starts: tensor(&starts)? })
    }

    /// The taken rows of `x`, `[rows, width]`, as `[taken, width]`.
    pub(crate) fn take(&self, x: &Tensor) -> Result<Tensor> {
        embedding(x, &self.index)
    }

    /// The gradient at the rows, `[rows, width]`, from that at the taken ones, `[taken, width]`: sums over a row's places.
    /// The backward pass of `embedding` adds row by row, at up to twenty times the cost.
    pub(crate) fn backward(&self, at: &Tensor) -> Result<Tensor> {
        const SUM: i64 = 0;
        let none = None::<Tensor>;
        Ok(Tensor::f_embedding_bag(at, &self.places, &self.starts, false, SUM, false, none, true)?.0)
    }
}

/// Pieces with about as many queries each, padded to the longest.
#[derive(Debug)]
pub(crate) struct HeadBucket {
    pub(crate) n_pieces: i64,
    pub(crate) n_queries: i64,
    pub(crate) n_keys: i64,
    /// Added to scores: 0 where a query sees a key, else −∞, `[pieces, 1, queries, keys]`.
    pub(crate) bias: Tensor,
}

/// A packed batch's tokens by heads. The taken rows are bucket by bucket, in each `[pieces, heads, queries or keys]`.
#[derive(Debug)]
pub(crate) struct HeadRows {
    pub(crate) buckets: Vec<HeadBucket>,
    /// From `[places or tokens · n_heads]`.
    pub(crate) queries: Gather,
    /// From `[tokens · n_kv_heads]`.
    pub(crate) keys: Gather,
    /// From the results of all buckets, to `[places or tokens · n_heads]`.
    pub(crate) back: Gather,
}

impl HeadRows {
    /// The queries are those of all tokens, or only those at some places of the flattened `[n · pos]`, ascending. `kind`:
    /// that of the bias.
    pub(crate) fn of(
        packing: &Packing,
        places: Option<&[i64]>,
        [n_heads, n_kv_heads, d_head]: [i64; 3],
        kind: Kind,
    ) -> Result<Self> {
        let (device, (groups, pos)) = (packing.positions.device(), packing.positions.size2()?);
        let (n_heads, n_kv_heads, pos, n_tokens) =
            (n_heads as usize, n_kv_heads as usize, pos as usize, (groups * pos) as usize);
        let n_rows = places.map_or(n_tokens, <[i64]>::len);
        let place_of = |row: usize| places.map_or(row, |places| places[row] as usize);
        let (mut queries, mut keys, mut buckets) = (vec![], vec![], vec![]);
        let mut back = vec![None; n_rows * n_heads];
        for pieces in classes(packing, places, pos, n_heads * d_head as usize) {
            let (n_queries, n_keys) = size(&pieces);
            let mut bias = Vec::with_capacity(pieces.len() * n_queries * n_keys);
            for Asking { piece, rows } in &pieces {
                // What fills up a piece has no gradient: nothing reads such a query's result, no query sees such a key. It
                // is a token of the same group, since another group's could be NaN, and 0 · NaN is NaN.
                let first = piece.group * pos;
                let row_of = |at: usize| rows.start + if at < rows.len() { at } else { 0 };
                for (head, at) in (0..n_heads).flat_map(|head| (0..n_queries).map(move |at| (head, at))) {
                    let row = row_of(at) * n_heads + head;
                    if at < rows.len() {
                        back[row] = Some(queries.len());
                    }
                    queries.push(row);
                }
                for (head, at) in (0..n_kv_heads).flat_map(|head| (0..n_keys).map(move |at| (head, at))) {
                    let place = piece.path.get(at).unwrap_or(&piece.path[0]);
                    keys.push((first + place) * n_kv_heads + head);
                }
                for at in 0..n_queries {
                    let own = place_of(row_of(at)) - first - piece.start;
                    let seen = piece.path.len() - (piece.to - piece.from) + own + 1;
                    bias.resize(bias.len() + seen, 0.0_f32);
                    bias.resize(bias.len() + n_keys - seen, f32::NEG_INFINITY);
                }
            }
            let (n_pieces, n_queries, n_keys) = (pieces.len() as i64, n_queries as i64, n_keys as i64);
            let bias = Tensor::f_from_slice(&bias)?.f_view([n_pieces, 1, n_queries, n_keys])?;
            let bias = bias.f_to_kind(kind)?.f_to_device(device)?;
            buckets.push(HeadBucket { n_pieces, n_queries, n_keys, bias });
        }
        // A token that fills up its group has no query; it takes the result of another token of its group.
        let mut of_group = vec![0; groups as usize];
        for (row, taken) in back.iter().enumerate() {
            if let Some(taken) = taken {
                of_group[place_of(row / n_heads) / pos] = *taken;
            }
        }
        let back = back.iter().enumerate();
        let back = back.map(|(row, taken)| taken.unwrap_or_else(|| of_group[place_of(row / n_heads) / pos]));
        Ok(Self {
            buckets,
            back: Gather::of(&back.collect::<Vec<_>>(), queries.len(), device)?,
            queries: Gather::of(&queries, n_rows * n_heads, device)?,
            keys: Gather::of(&keys, n_tokens * n_kv_heads, device)?,
        })
    }
}

/// A piece with the rows of its queries.
struct Asking<'p> {
    piece: &'p Piece,
    rows: Range<usize>,
}

/// The pieces that have queries, in classes of about as many queries each, merged where this adds little padding.
fn classes<'p>(packing: &'p Packing, places: Option<&[i64]>, pos: usize, width: usize) -> Vec<Vec<Asking<'p>>> {
    let mut by_length: BTreeMap<usize, Vec<Asking<'_>>> = BTreeMap::new();
    for piece in &packing.pieces {
        let own = piece.group * pos + piece.start;
        let own = own..own + piece.to - piece.from;
        let row = |place: usize| places.map_or(place, |places| places.partition_point(|at| (*at as usize) < place));
        let rows = row(own.start)..row(own.end);
        if !rows.is_empty() {
            by_length.entry(rows.len().next_power_of_two()).or_default().push(Asking { piece, rows });
        }
    }
    let mut classes: Vec<Vec<Asking<'_>>> = vec![];
    let cost = |n_pieces: usize, (queries, keys): (usize, usize)| n_pieces * queries * keys * width;
    for class in by_length.into_values() {
        if let Some(last) = classes.last_mut() {
            let (a, b) = (size(last), size(&class));
            let apart = cost(last.len(), a) + cost(class.len(), b);
            if cost(last.len() + class.len(), (a.0.max(b.0), a.1.max(b.1))) <= apart + FEW {
                last.extend(class);
                continue;
            }
        }
        classes.push(class);
    }
    classes
}

/// The most queries and keys of a piece.
fn size(pieces: &[Asking<'_>]) -> (usize, usize) {
    let most = |of: fn(&Asking<'_>) -> usize| pieces.iter().map(of).max().unwrap_or(0);
    (most(|asking| asking.rows.len()), most(|asking| asking.piece.path.len()))
}
