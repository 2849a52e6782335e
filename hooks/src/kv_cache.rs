//! Keys and values of past positions, owned by the caller. Rows may differ in length: a slot that holds padding is
//! never attended to, and a token's position is the number of real tokens before it in its row.

use tch::{Device, Kind, Tensor};

use crate::batch::Batch;
use crate::config::Config;
use crate::error::Result;

/// Keys and values of the positions run so far.
#[derive(Debug)]
pub struct KvCache {
    /// Per block, keys and values `[batch, n_kv_heads, capacity, d_head]`.
    blocks: Vec<(Tensor, Tensor)>,
    /// Slots filled, padding included.
    width: i64,
    /// Which slots hold a token, `[batch, capacity]`, bool.
    valid: Tensor,
    /// Real tokens per row.
    lengths: Vec<i64>,
    /// Whether no slot so far holds padding.
    dense: bool,
}

/// Where a pass's new tokens stand, and what they may attend to besides causality.
pub(crate) struct Placement {
    /// Positions of the new tokens, `[1 or batch, pos]`, i64.
    pub(crate) positions: Tensor,
    /// Which slots each new token may see, `[batch, 1, pos, slots]`, bool; `None`: see `causal`.
    pub(crate) mask: Option<Tensor>,
    /// Without a mask: whether the plain causal triangle holds.
    pub(crate) causal: bool,
}

impl KvCache {
    /// Room for `capacity` positions of `batch` rows.
    pub fn new(config: &Config, batch: i64, capacity: i64, kind: Kind, device: Device) -> Result<Self> {
        let size = [batch, config.n_kv_heads, capacity, config.d_head];
        let empty = || Tensor::f_zeros(size, (kind, device));
        let blocks = (0..config.n_layers).map(|_| Ok((empty()?, empty()?))).collect::<Result<_>>()?;
        let valid = Tensor::f_zeros([batch, capacity], (Kind::Bool, device))?;
        Ok(Self { blocks, width: 0, valid, lengths: vec![0; batch as usize], dense: true })
    }

    /// How many real tokens each row has so far.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Takes the batch's tokens in: from here on they count as seen.
    pub(crate) fn place(&mut self, batch: &Batch) -> Result<Placement> {
        let (device, new) = (self.valid.device(), batch.width() as i64);
        let before = self.width;
        let steps = Tensor::f_arange(new, (Kind::Int64, device))?;
        let lengths = Tensor::f_from_slice(&self.lengths)?.f_unsqueeze(1)?.f_to_device(device)?;
        let positions = if self.dense { &steps + before } else { steps.f_unsqueeze(0)?.f_add(&lengths)? };

        self.valid.f_narrow(1, before, new)?.f_copy_(&batch.valid()?)?;
        for (length, added) in self.lengths.iter_mut().zip(&batch.lengths) {
            *length += *added as i64;
        }
        self.width += new;
        let was_dense = self.dense;
        self.dense &= batch.lengths.iter().all(|length| *length as i64 == new);

        // Padding on the right of a first block is behind every real token; anything else needs the slots spelt out.
        let mask = if before == 0 || (was_dense && new == 1) {
            None
        } else {
            let slots = Tensor::f_arange(self.width, (Kind::Int64, device))?;
            let causal = slots.f_unsqueeze(0)?.f_le_tensor(&(&steps + before).f_unsqueeze(1)?)?; // [pos, slots]
            let valid = self.valid.f_narrow(1, 0, self.width)?.f_unsqueeze(1)?.f_unsqueeze(1)?;
            Some(valid.f_logical_and(&causal)?)
        };
        let positions = if positions.dim() == 1 { positions.f_unsqueeze(0)? } else { positions };
        Ok(Placement { positions, mask, causal: before == 0 })
    }

    /// Stores a block's keys and values of the pass's new tokens and returns those of all slots so far.
    pub(crate) fn extend(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let new = k.size4()?.2;
        let (keys, values) = &self.blocks[layer];
        let from = self.width - new;
        keys.f_narrow(2, from, new)?.f_copy_(k)?;
        values.f_narrow(2, from, new)?.f_copy_(v)?;
        Ok((keys.f_narrow(2, 0, self.width)?, values.f_narrow(2, 0, self.width)?))
    }

    /// This cache's rows, chosen by index; an index may come more than once.
    pub fn select(&self, rows: &[i64]) -> Result<Self> {
        let device = self.valid.device();
        let index = Tensor::f_from_slice(rows)?.f_to_device(device)?;
        let pick = |tensor: &Tensor| tensor.f_index_select(0, &index);
        let blocks = self.blocks.iter().map(|(k, v)| Ok((pick(k)?, pick(v)?))).collect::<Result<_>>()?;
        let lengths = rows.iter().map(|row| self.lengths[*row as usize]).collect();
        Ok(Self { blocks, width: self.width, valid: pick(&self.valid)?, lengths, dense: self.dense })
    }
}
