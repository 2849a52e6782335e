//! Names of an adapter's tensors: the block, projection and factor that each name means, and the likely origin of other
//! names.

use crate::proj::Proj;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Factor {
    A,
    B,
}

pub(super) type FactorAt = (usize, Proj, Factor);

/// Each part that a wrapper of the model inserts into the names of its tensors, and the wrapper.
const WRAPPERS: [(&str, &str); 4] = [
    ("_orig_mod", "torch.compile"),
    ("module", "data parallelism"),
    ("_fsdp_wrapped_module", "FSDP"),
    ("_checkpoint_wrapped_module", "activation checkpointing"),
];

/// The part of a name that a wrapper inserted, and the wrapper.
pub(super) fn wrapper(name: &str) -> Option<(&'static str, &'static str)> {
    WRAPPERS.into_iter().find(|(part, _)| name.split('.').any(|other| other == *part))
}

/// PEFT's name for a tensor.
pub(super) fn name((layer, proj, factor): FactorAt) -> String {
    format!("base_model.model.{}.lora_{factor:?}.weight", super::module(layer, proj))
}

/// The factor that a tensor's name means; `None` if it is not a factor of a Qwen's LoRA. Besides PEFT's own names this
/// reads names with a wrapper's parts (the caller refuses these), with the adapter's name after the factor
/// (`lora_A.default.weight`), and with `base_model` or `model` missing or repeated at the start.
pub(super) fn factor_at(name: &str) -> Option<FactorAt> {
    let mut parts = bare(name);
    if parts.pop() != Some("weight") {
        return None;
    }
    let layers = parts.iter().position(|part| *part == "layers")?;
    if parts[..layers].iter().any(|part| *part != "model") {
        return None;
    }
    let (layer, path, factor) = match parts[layers + 1..] {
        [layer, parent, proj, factor] | [layer, parent, proj, factor, _] => (layer, format!("{parent}.{proj}"), factor),
        _ => return None,
    };
    let proj = Proj::ALL.into_iter().find(|proj| proj.path() == path)?;
    let factor = match factor {
        "lora_A" => Factor::A,
        "lora_B" => Factor::B,
        _ => return None,
    };
    Some((layer.parse().ok()?, proj, factor))
}

/// The base's tensor that a whole saved module replaces: PEFT saves embeddings and head with a LoRA if they were
/// trained or resized.
pub(super) fn of_base(name: &str) -> Option<&'static str> {
    let parts = bare(name);
    let parts = &parts[parts.iter().position(|part| *part != "model")?..];
    match parts {
        ["embed_tokens", "weight"] | ["embed_tokens", "modules_to_save", .., "weight"] => {
            Some("model.embed_tokens.weight")
        }
        ["lm_head", "weight"] | ["lm_head", "modules_to_save", .., "weight"] => Some("lm_head.weight"),
        _ => None,
    }
}

/// A name's parts, without wrappers' parts and without a leading `base_model`.
fn bare(name: &str) -> Vec<&str> {
    let mut parts: Vec<&str> = name.split('.').filter(|part| wrapper(part).is_none()).collect();
    if parts.first() == Some(&"base_model") {
        parts.remove(0);
    }
    parts
}

/// The origin of an unused tensor, as its name shows it.
pub(super) fn meaning(name: &str) -> Option<&'static str> {
    let has = |part: &str| name.split('.').any(|other| other == part);
    let found = [
        (has("lora_magnitude_vector"), "lora_magnitude_vector is of DoRA, which is not supported"),
        (has("lora_E") || has("ranknum"), "lora_E is of AdaLoRA, which is not supported"),
        (
            has("lora_embedding_A") || has("lora_embedding_B"),
            "lora_embedding is of a LoRA on embeddings, which is not supported",
        ),
        (name.contains("lm_head.") && name.contains("lora_"), "a LoRA on the head is not supported"),
        (
            name.matches("base_model.").count() > 1,
            "base_model twice is of an adapter around another one; the inner one is a part of its base",
        ),
        (has("lora_B") && has("bias"), "lora_B.bias is of a LoRA with biases, which is not supported"),
        (has("bias"), "these biases were trained beside the LoRA, which is not supported"),
        (has("token_adapter"), "token_adapter is of trained tokens, which are not supported"),
        (
            name.ends_with("lora_a") || name.ends_with("lora_b"),
            "lora_a and lora_b are of MLX, whose layout is another one",
        ),
        (has("visual") || has("vision_tower") || has("language_model"), "its base is a model of images and text"),
    ];
    found.into_iter().find_map(|(is_so, meaning)| is_so.then_some(meaning))
}

/// The longest common beginning of the names, in whole parts.
pub(super) fn common_beginning(names: &[String]) -> String {
    let Some((first, others)) = names.split_first() else { return String::new() };
    let same = |other: &String| first.split('.').zip(other.split('.')).take_while(|(one, other)| one == other).count();
    let shared = others.iter().map(same).min().unwrap_or(0);
    first.split_inclusive('.').take(shared).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_whatever_is_wrapped_around_it() {
        let down_b = (3, Proj::Down, Factor::B);
        let plain = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight";
        assert_eq!((name(down_b).as_str(), factor_at(plain)), (plain, Some(down_b)));
        for wrapped in [
            "_orig_mod.base_model.model.model.layers.3.mlp.down_proj.lora_B.weight",
            "module._orig_mod.base_model.model.model.layers.3.mlp.down_proj.lora_B.weight",
            "base_model.model._orig_mod.model.layers.3.mlp.down_proj.lora_B.weight",
            "base_model.model.model.layers.3._checkpoint_wrapped_module.mlp.down_proj.lora_B.default.weight",
            "_fsdp_wrapped_module.base_model.model.model.layers.3._fsdp_wrapped_module.mlp.down_proj.lora_B.weight",
            "base_model.model.model.layers.3.mlp.down_proj.lora_B.default.weight",
            "model.layers.3.mlp.down_proj.lora_B.weight",
            "layers.3.mlp.down_proj.lora_B.weight",
            "base_model.model.model.model.layers.3.mlp.down_proj.lora_B.weight",
        ] {
            assert_eq!(factor_at(wrapped), Some(down_b), "{wrapped}");
        }
        for other in [
            "base_model.model.base_model.model.model.layers.3.mlp.down_proj.lora_B.weight",
            "base_model.model.model.language_model.layers.3.mlp.down_proj.lora_B.weight",
            "base_model.model.model.layers.3.mlp.down_proj.lora_B.bias",
            "base_model.model.model.layers.3.mlp.down_proj.lora_magnitude_vector.weight",
            "base_model.model.model.layers.3.mlp.q_proj.lora_B.weight",
            "base_model.model.model.layers.x.mlp.down_proj.lora_B.weight",
            "base_model.model.model.layers",
            "model.layers.3.mlp.down_proj.lora_b",
            "lora_A.weight",
            "",
        ] {
            assert_eq!(factor_at(other), None, "{other}");
        }
    }

    #[test]
    fn embeddings_and_head_are_known_by_any_name() {
        for embedding in [
            "base_model.model.model.embed_tokens.weight",
            "base_model.model.model.embed_tokens.modules_to_save.default.weight",
            "_orig_mod.base_model.model.model.embed_tokens.modules_to_save.weight",
            "model.embed_tokens.weight",
        ] {
            assert_eq!(of_base(embedding), Some("model.embed_tokens.weight"), "{embedding}");
        }
        assert_eq!(of_base("base_model.model.lm_head.weight"), Some("lm_head.weight"));
        for other in ["base_model.model.lm_head.lora_A.weight", "base_model.model.model.norm.weight", "model", ""] {
            assert_eq!(of_base(other), None, "{other}");
        }
    }

    #[test]
    fn a_common_beginning_is_of_whole_parts() {
        let of = |names: &[&str]| common_beginning(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["a.b.cd.e", "a.b.ce"]), "a.b.");
        assert_eq!(of(&["ab", "ac"]), "");
        assert_eq!(of(&[]), "");
        assert_eq!(of(&["a.é.b", "a.è.b"]), "a.");
    }
}
