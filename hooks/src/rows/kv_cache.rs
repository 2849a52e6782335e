//! Keys and values of past positions, owned by the caller. A row's tokens fill its slots from 0 on without gaps, so
//! slot and position are the same number. Rows can leave and join between passes.

use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::error::Result;
use crate::ops::embedding;
use crate::rows::batch::Batch;
use crate::rows::packing::Packing;

/// Keys and values of the positions run so far.
#[derive(Debug)]
pub struct KvCache {
    /// Per block, keys and values `[rows, capacity, n_kv_heads, d_head]`; rows beyond those of `lengths` are free.
    blocks: Vec<(Tensor, Tensor)>,
    /// Tokens per row.
    lengths: Vec<i64>,
    /// The slots that the current pass's tokens are stored in.
    incoming: Incoming,
}

/// The slots that a pass's tokens are stored in.
#[derive(Debug)]
enum Incoming {
    /// The same slots in all rows, from this one on.
    Side(i64),
    /// The places of the tokens in the flattened `[batch · pos]`, and of their slots in the flattened `[rows ·
    /// capacity]`; both `[n]`, i64.
    Scattered { tokens: Tensor, slots: Tensor },
}

/// The positions of a pass's new tokens, and which slots they may attend to.
pub(crate) struct Placement<'a> {
    /// Positions of the new tokens, `[1 or batch, pos]`, i64.
    pub(crate) positions: Tensor,
    /// Which slots each new token may see, `[1 or batch, 1, pos, slots]`, bool; `None`: see `causal`.
    pub(crate) mask: Option<Tensor>,
    /// Without a mask: whether attention is plainly causal.
    pub(crate) causal: bool,
    /// How a packed batch's tokens attend to each other.
    pub(crate) packing: Option<&'a Packing>,
}

impl<'a> Placement<'a> {
    pub(crate) fn packed(packing: &'a Packing) -> Self {
        Self { positions: packing.positions.shallow_clone(), mask: None, causal: true, packing: Some(packing) }
    }
}

impl KvCache {
    /// An empty cache with room for `capacity` positions of `batch` rows.
    pub fn new(config: &Config, batch: i64, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        // Zeros, not uninitialised memory: a masked slot is multiplied by 0, and 0 · NaN is NaN.
        let empty = || Tensor::f_zeros([batch, capacity, config.n_kv_heads, config.d_head], (kind, device));
        let blocks = (0..config.n_layers).map(|_| Ok((empty()?, empty()?))).collect::<Result<_>>()?;
        Ok(Self { blocks, lengths: vec![0; batch as usize], incoming: Incoming::Side(0) })
    }

    /// Number of tokens of each row so far.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Adds the batch's tokens, before their keys and values are stored. A packed batch must be the cache's first.
    pub(crate) fn place<'a>(&mut self, batch: &'a Batch) -> Result<Placement<'a>> {
        let (device, before) = (batch.ids.device(), self.lengths.clone());
        for (length, added) in self.lengths.iter_mut().zip(&batch.lengths) {
            *length += *added as i64;
        }
        if let Some(packing) = &batch.packing {
            self.incoming = self.scattered(batch, &before)?;
            return Ok(Placement::packed(packing));
        }

        let new = batch.width() as i64;
        let from = before.first().copied().unwrap_or(0);
        let side_by_side = before.iter().all(|length| *length == from);
        self.incoming = if side_by_side { Incoming::Side(from) } else { self.scattered(batch, &before)? };
        let starts = if side_by_side { Tensor::f_from_slice(&[from])? } else { Tensor::f_from_slice(&before)? };
        let steps = Tensor::f_arange(new, (Kind::Int64, device))?;
        let positions = starts.f_to_device(device)?.f_unsqueeze(1)?.f_add(&steps)?; // [1 or batch, pos]

        let whole = batch.lengths.iter().all(|length| *length as i64 == new);
        let mask = if side_by_side && (from == 0 || (new == 1 && whole)) {
            None
        } else {
            let slots = Tensor::f_arange(self.width(), (Kind::Int64, device))?;
            Some(slots.f_le_tensor(&positions.f_unsqueeze(-1)?)?.f_unsqueeze(1)?)
        };
        Ok(Placement { positions, mask, causal: side_by_side && from == 0, packing: None })
    }

    fn scattered(&self, batch: &Batch, before: &[i64]) -> Result<Incoming> {
        let (mut tokens, mut slots) = (Vec::new(), Vec::new());
        for (row, (length, before)) in batch.lengths.iter().zip(before).enumerate() {
            tokens.extend((0..*length).map(|token| batch.place(row, token)));
            slots.extend((0..*length as i64).map(|token| row as i64 * self.capacity() + before + token));
        }
        let device = batch.ids.device();
        let tensor = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(device);
        Ok(Incoming::Scattered { tokens: tensor(&tokens)?, slots: tensor(&slots)? })
    }

    /// Stores a block's keys and values of the pass's new tokens, `[batch, pos, n_kv_heads, d_head]`. Returns those of
    /// all slots so far, `[batch, slots, ..]`, or for a packed batch only the new ones, unchanged.
    pub(crate) fn extend(&mut self, layer: usize, k: &Tensor, v: &Tensor, packed: bool) -> Result<(Tensor, Tensor)> {
        let (keys, values) = &self.blocks[layer];
        for (stored, new) in [(keys, k), (values, v)] {
            let (_, pos, heads, d_head) = new.size4()?;
            match &self.incoming {
                Incoming::Side(from) => {
                    self.live(stored)?.f_narrow(1, *from, pos)?.f_copy_(new)?;
                }
                Incoming::Scattered { tokens, slots } => {
                    let new = embedding(&new.f_reshape([-1, heads * d_head])?, tokens)?;
                    let _ = stored.f_view([-1, heads * d_head])?.f_index_copy_(0, slots, &new)?;
                }
            }
        }
        if packed {
            return Ok((k.shallow_clone(), v.shallow_clone()));
        }
        let width = self.width();
        Ok((self.live(keys)?.f_narrow(1, 0, width)?, self.live(values)?.f_narrow(1, 0, width)?))
    }

    /// A new cache with the rows at these indices, which may repeat.
    pub fn select(&self, rows: &[i64]) -> Result<Self> {
        let device = self.blocks.first().map_or(Device::Cpu, |(keys, _)| keys.device());
        let index = Tensor::f_from_slice(rows)?.f_to_device(device)?;
        let pick = |tensor: &Tensor| tensor.f_index_select(0, &index);
        let blocks = self.blocks.iter().map(|(k, v)| Ok((pick(k)?, pick(v)?))).collect::<Result<_>>()?;
        let lengths = rows.iter().map(|row| self.lengths[*row as usize]).collect();
        Ok(Self { blocks, lengths, incoming: Incoming::Side(0) })
    }

    /// Keeps some rows, given in ascending order. Only the last rows move, into the places of rows that leave. Returns
    /// the old indices in the new order.
    pub(crate) fn keep(&mut self, staying: &[usize]) -> Result<Vec<usize>> {
        let n = staying.len();
        let mut order: Vec<usize> = (0..n).collect();
        let holes: Vec<usize> = (0..n).filter(|row| staying.binary_search(row).is_err()).collect();
        let movers: Vec<usize> = staying.iter().copied().filter(|row| *row >= n).collect();
        for (hole, mover) in holes.iter().zip(&movers) {
            order[*hole] = *mover;
        }
        if let (Some((stored, _)), false) = (self.blocks.first(), movers.is_empty()) {
            // One upload and one copy for each tensor: a GPU is called as often for one row as for all.
            let index = |rows: &[usize]| {
                let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
                Tensor::f_from_slice(&rows)?.f_to_device(stored.device())
            };
            let (holes, movers) = (index(&holes)?, index(&movers)?);
            for stored in self.tensors() {
                let _ = stored.shallow_clone().f_index_copy_(0, &holes, &stored.f_index_select(0, &movers)?)?;
            }
        }
        self.lengths = order.iter().map(|row| self.lengths[*row]).collect();
        Ok(order)
    }

    /// Appends another cache's rows; there must be room.
    pub(crate) fn append(&mut self, others: &Self) -> Result<()> {
        let (n, more, width) = (self.lengths.len() as i64, others.lengths.len() as i64, others.width());
        for (stored, new) in self.tensors().zip(others.tensors()) {
            let new = others.live(new)?.f_narrow(1, 0, width)?;
            stored.f_narrow(0, n, more)?.f_narrow(1, 0, width)?.f_copy_(&new)?;
        }
        self.lengths.extend(&others.lengths);
        Ok(())
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.blocks.iter().flat_map(|(keys, values)| [keys, values])
    }

    fn live(&self, stored: &Tensor) -> Result<Tensor> {
        Ok(stored.f_narrow(0, 0, self.lengths.len() as i64)?)
    }

    fn capacity(&self) -> i64 {
        self.blocks.first().map_or(0, |(keys, _)| keys.size()[1])
    }

    /// Number of slots of the longest row.
    fn width(&self) -> i64 {
        self.lengths.iter().copied().max().unwrap_or(0)
    }
}
