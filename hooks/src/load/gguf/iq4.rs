//! The 4-bit types with a table of values, which candle lacks. A weight is one of sixteen values, which are denser near
//! zero, times the scale of its block. Low-bit files use these types where the row length is not a multiple of 256, as
//! in the 0.5B.

use half::f16;

/// `IQ4_NL`: a block of 32 elements is a scale and 16 bytes of two indices each; the upper four bits belong to the
/// block's second half.
pub(super) const NL_BLOCK: usize = 32;
pub(super) const NL_BYTES: usize = 18;

/// `IQ4_XS`: a block of 256 elements is a scale, eight 6-bit scales for 32 elements each, and the indices in `IQ4_NL`'s
/// order.
pub(super) const XS_BLOCK: usize = 256;
pub(super) const XS_BYTES: usize = 136;

const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Dequantises whole blocks of `IQ4_NL`.
pub(super) fn nl(blocks: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(blocks.len() / NL_BYTES * NL_BLOCK);
    for block in blocks.chunks_exact(NL_BYTES) {
        append(&mut out, scale(block), &block[2..]);
    }
    out
}

/// Dequantises whole blocks of `IQ4_XS`.
pub(super) fn xs(blocks: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(blocks.len() / XS_BYTES * XS_BLOCK);
    for block in blocks.chunks_exact(XS_BYTES) {
        let high = u16::from_le_bytes([block[2], block[3]]); // two bits of each scale
        for (at, indices) in block[8..].chunks_exact(NL_BLOCK / 2).enumerate() {
            let low = block[4 + at / 2] >> (4 * (at % 2)) & 0xf; // the other four
            let own = (u16::from(low) | (high >> (2 * at) & 3) << 4) as i8 - 32;
            append(&mut out, scale(block) * f32::from(own), indices);
        }
    }
    out
}

fn scale(block: &[u8]) -> f32 {
    f16::from_le_bytes([block[0], block[1]]).to_f32()
}

/// Appends 32 elements from their 16 bytes.
fn append(out: &mut Vec<f32>, scale: f32, indices: &[u8]) {
    let value = |index: u8| scale * f32::from(VALUES[usize::from(index)]);
    out.extend(indices.iter().map(|pair| value(pair & 0xf)));
    out.extend(indices.iter().map(|pair| value(pair >> 4)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of random bits are dequantised, bit for bit, as by Python's gguf package.
    #[test]
    fn both_types_are_as_in_llama_cpp_s_own_package() {
        let golden = include_bytes!("../../../../tests/golden/iq4/iq4.safetensors");
        let golden = safetensors::SafeTensors::deserialize(golden).unwrap();
        let tensor = |name: &str| golden.tensor(name).unwrap().data().to_vec();
        for (kind, dequantize) in [("iq4_nl", nl as fn(&[u8]) -> Vec<f32>), ("iq4_xs", xs)] {
            let found = dequantize(&tensor(&format!("{kind}.blocks")));
            let expected = tensor(&format!("{kind}.values"));
            let expected: Vec<u32> =
                expected.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            assert!(expected.len() >= 2048 && expected.iter().any(|bits| *bits != 0), "{kind}");
            assert_eq!(found.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), expected, "{kind}");
        }
    }
}
