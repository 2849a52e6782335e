//! The types in which a GGUF file stores tensors, and their conversion to f32.

use std::fmt;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;

use super::iq4;

/// A type of stored tensors that can be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    Candle(GgmlDType),
    Iq4Nl,
    Iq4Xs,
}

/// Types that are not read, by their number in the file. `Q8_1` and `Q8_K` are for activations, and weights are not
/// integers.
const UNREAD: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl Stored {
    /// The type with a number. The error names the type and has a hint.
    pub(crate) fn of(id: u32) -> Result<Self, String> {
        Ok(Self::Candle(match id {
            0 => GgmlDType::F32,
            1 => GgmlDType::F16,
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            30 => GgmlDType::BF16,
            20 => return Ok(Self::Iq4Nl),
            23 => return Ok(Self::Iq4Xs),
            other => {
                let name = UNREAD.iter().find(|(id, _)| *id == other).map(|(_, name)| (*name).to_owned());
                return Err(name.unwrap_or_else(|| format!("type {other}")));
            }
        }))
    }

    /// Elements per block.
    pub(crate) fn block_size(self) -> usize {
        match self {
            Self::Candle(dtype) => dtype.block_size(),
            Self::Iq4Nl => iq4::NL_BLOCK,
            Self::Iq4Xs => iq4::XS_BLOCK,
        }
    }

    pub(crate) fn block_bytes(self) -> usize {
        match self {
            Self::Candle(dtype) => dtype.type_size(),
            Self::Iq4Nl => iq4::NL_BYTES,
            Self::Iq4Xs => iq4::XS_BYTES,
        }
    }

    /// Dequantises `n` elements in whole blocks.
    pub(crate) fn dequantize(self, blocks: &[u8], n: usize) -> Result<Vec<f32>, String> {
        let dtype = match self {
            Self::Iq4Nl => return Ok(iq4::nl(blocks)),
            Self::Iq4Xs => return Ok(iq4::xs(blocks)),
            Self::Candle(dtype) => dtype,
        };
        match dtype.from_data(blocks.into()).dequantize(n).map_err(|error| format!("{self:?} block: {error}"))? {
            CpuStorage::F32(values) => Ok(values),
            _ => Err(format!("{self:?} block: expected it to dequantise to f32")),
        }
    }
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Candle(dtype) => write!(f, "{dtype:?}"),
            Self::Iq4Nl => f.write_str("IQ4_NL"),
            Self::Iq4Xs => f.write_str("IQ4_XS"),
        }
    }
}
