//! Rows of token ids as one tensor: padded on the right (attention is causal, so padding affects nothing), or packed
//! without padding, with shared beginnings of rows stored once.

use tch::{Device, Kind, Tensor};

use crate::chat::tokens::Sequence;
use crate::error::{Error, Result};
use crate::rows::packing::{PackedRow, Packing};

/// Token ids of some rows.
#[derive(Debug)]
pub struct Batch {
    /// `[batch, pos]`, i64, padded on the right with 0.
    pub ids: Tensor,
    /// Number of tokens of each row.
    pub lengths: Vec<usize>,
    pub(crate) packing: Option<Packing>,
}

impl Batch {
    /// A padded batch of prompts.
    pub fn of(prompts: &[&Sequence], device: Device) -> Result<Self> {
        let rows: Vec<&[i64]> = prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
        Self::from_ids(&rows, device)
    }

    /// A padded batch of rows of token ids.
    pub fn from_ids(rows: &[&[i64]], device: Device) -> Result<Self> {
        let lengths: Vec<usize> = rows.iter().map(|row| row.len()).collect();
        let width = lengths.iter().copied().max().unwrap_or(0);
        if let Some(row) = lengths.iter().position(|length| *length == 0) {
            return Err(no_tokens(row));
        }
        let mut ids = vec![0_i64; rows.len() * width];
        for (row, padded) in rows.iter().zip(ids.chunks_mut(width.max(1))) {
            padded[..row.len()].copy_from_slice(row);
        }
        let ids = Tensor::f_from_slice(&ids)?.f_view([rows.len() as i64, width as i64])?.f_to_device(device)?;
        Ok(Self { ids, lengths, packing: None })
    }

    /// Packs groups of rows without padding, `ids` as `[groups, pos]`. With `share`, common beginnings of a group's
    /// rows (same ids, doses and edits) are run once. Taps see the packed tokens; scores and pattern cannot be tapped.
    pub fn packed(groups: &[&[PackedRow<'_>]], share: bool, device: Device) -> Result<Self> {
        let rows = || groups.iter().copied().flatten();
        if let Some(row) = rows().position(|row| row.ids.is_empty()) {
            return Err(no_tokens(row));
        }
        let (packing, ids) = Packing::of(groups, share, device)?;
        let ids = Tensor::f_from_slice(&ids)?.f_view([groups.len() as i64, -1])?.f_to_device(device)?;
        Ok(Self { ids, lengths: rows().map(|row| row.ids.len()).collect(), packing: Some(packing) })
    }

    /// The index of a row's token in the flattened `[batch · pos]`.
    pub fn place(&self, row: usize, token: usize) -> i64 {
        match &self.packing {
            Some(packing) => packing.places[row][token],
            None => (row * self.width() + token) as i64,
        }
    }

    /// Each token's position in its row, in a packed batch, `[groups · pos]`, i64.
    pub(crate) fn positions(&self) -> Result<Tensor> {
        match &self.packing {
            Some(packing) => Ok(packing.positions.f_flatten(0, 1)?),
            None => Err(Error::invalid("the batch", "packed rows", "padded ones")),
        }
    }

    /// The doses of a packed batch, as `Gate::spread` takes them; empty if the batch is not packed.
    pub fn doses(&self) -> &[Vec<f64>] {
        self.packing.as_ref().map_or(&[], |packing| &packing.doses)
    }

    /// Cuts every row to the positions `from .. to`; rows that end before `to` are shorter.
    pub fn narrow(&self, from: usize, to: usize) -> Result<Self> {
        let ids = self.ids.f_narrow(1, from as i64, (to - from) as i64)?;
        let lengths = self.lengths.iter().map(|length| (*length).clamp(from, to) - from).collect();
        Ok(Self { ids, lengths, packing: None })
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.lengths.len()
    }

    /// Number of positions of the longest row.
    pub fn width(&self) -> usize {
        self.ids.size().get(1).map_or(0, |width| *width as usize)
    }

    /// Which positions hold a token rather than padding, `[batch, pos]`, bool, on the CPU.
    pub fn valid(&self) -> Result<Tensor> {
        let lengths: Vec<i64> = self.lengths.iter().map(|length| *length as i64).collect();
        let positions = Tensor::f_arange(self.width() as i64, (Kind::Int64, Device::Cpu))?;
        Ok(positions.f_unsqueeze(0)?.f_lt_tensor(&Tensor::f_from_slice(&lengths)?.f_unsqueeze(1)?)?)
    }
}

fn no_tokens(row: usize) -> Error {
    Error::invalid(format!("row {row} of the batch"), "at least one token", "none")
}
