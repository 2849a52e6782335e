use super::*;

/// Qwen2.5-0.5B as transformers 4 writes it.
fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "attention_dropout": 0.0, "bos_token_id": 151_643, "eos_token_id": 151_645, "hidden_act": "silu",
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 21, "sliding_window": 32768,
        "use_sliding_window": false, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "tie_word_embeddings": true,
        "vocab_size": 151_936, "rope_scaling": null
    })
}

/// Qwen3-0.6B as transformers 5 writes it.
fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "attention_bias": false,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "layer_types": vec!["full_attention"; 28], "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"}, "sliding_window": null,
        "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151_936
    })
}

fn parse(json: &Value) -> Result<Config> {
    Config::parse(json.to_string().as_bytes(), Path::new("config.json"))
}

/// The message with which `base` is refused after some keys were changed (null removes a key).
fn refusal(mut base: Value, changes: &Value) -> String {
    for (key, value) in changes.as_object().unwrap() {
        base[key] = value.clone();
    }
    parse(&base).expect_err(&changes.to_string()).to_string()
}

#[test]
fn qwen2_of_transformers_4() {
    let config = parse(&qwen2()).unwrap();
    assert_eq!((config.d_model, config.n_layers, config.n_heads, config.n_kv_heads), (896, 24, 14, 2));
    assert_eq!((config.d_head, config.d_mlp, config.d_vocab, config.n_ctx), (64, 4864, 151_936, 32768));
    assert_eq!((config.rope_theta, config.rms_norm_eps), (1e6, 1e-6));
    assert!(config.tie_embeddings && config.qkv_bias && !config.qk_norm);
}

#[test]
fn qwen3_of_transformers_5() {
    let config = parse(&qwen3()).unwrap();
    assert_eq!((config.family, config.d_head, config.rope_theta), (Family::Qwen3, 128, 1e6));
    assert!(!config.qkv_bias && config.qk_norm);
    let mut without = qwen3();
    without.as_object_mut().unwrap().remove("head_dim");
    assert_eq!(parse(&without).unwrap().d_head, 128);
}

#[test]
fn what_is_written_is_read_back() {
    for json in [qwen2(), qwen3()] {
        let config = parse(&json).unwrap();
        assert_eq!(parse(&config.to_hf_json()).unwrap(), config);
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let cases = [
        (json!({"model_type": "llama"}), "model_type llama is not supported"),
        (json!({"architectures": ["Qwen2ForRewardModel"]}), "architectures Qwen2ForRewardModel"),
        (json!({"model_type": "qwen2_moe"}), "mixture of experts (model_type qwen2_moe)"),
        (json!({"num_experts": 64}), "mixture of experts"),
        (json!({"use_sliding_window": true}), "use_sliding_window true (a window of 32768 from layer 21 on)"),
        (json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "rope_scaling of type yarn"),
        (json!({"rope_scaling": {"factor": 4.0}}), "rope_scaling of type unnamed"),
        (json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}), "rope_parameters of type yarn"),
        (json!({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}), "partial_rotary_factor 0.5"),
        (json!({"hidden_act": "gelu"}), "hidden_act gelu"),
    ];
    for (changes, expected) in cases {
        let message = refusal(qwen2(), &changes);
        assert!(message.contains(expected) && message.contains("not supported"), "{message}");
    }
    let mut types = vec!["full_attention"; 28];
    types[27] = "sliding_attention";
    assert!(refusal(qwen3(), &json!({"layer_types": types})).contains("layer_types[27] sliding_attention"));
    assert!(refusal(qwen3(), &json!({"attention_bias": true})).contains("attention_bias true"));
}

#[test]
fn what_is_said_of_quantisation_is_found() {
    let said = |changes: &Value| {
        let mut json = qwen2();
        json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        assert!(parse(&json).is_ok(), "it is for the weights to tell");
        quantization(json.to_string().as_bytes(), Path::new("config.json")).unwrap().map(|(feature, _)| feature)
    };
    assert_eq!(said(&json!({})), None);
    assert_eq!(said(&json!({"quantization_config": null})), None);
    let awq = json!({"quantization_config": {"quant_method": "awq", "bits": 4}});
    assert_eq!(said(&awq).unwrap(), "quantization_config (awq)");
    let own = json!({"group_size": 64, "bits": 4, "mode": "affine"});
    let mlx = json!({"quantization": own, "quantization_config": own});
    assert_eq!(said(&mlx).unwrap(), "quantization (MLX, 4 bits in groups of 64)");
}

#[test]
fn a_sliding_window_behind_the_last_layer_is_no_window() {
    let mut json = qwen2();
    json["use_sliding_window"] = true.into();
    json["max_window_layers"] = 24.into();
    assert!(parse(&json).is_ok());
    json["max_window_layers"] = 23.into();
    assert!(parse(&json).is_err());
}

#[test]
fn nonsense_numbers_are_refused_by_key() {
    let cases = [
        (json!({"num_key_value_heads": 3}), "num_attention_heads is 14, expected a multiple of num_key_value_heads 3"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads is 0"),
        (json!({"num_attention_heads": 0}), "expected a multiple of num_attention_heads 0"),
        (json!({"num_attention_heads": 13, "num_key_value_heads": 1}), "hidden_size is 896, expected a multiple"),
        (json!({"hidden_size": -896}), "hidden_size is -896, expected 1 to 1048576"),
        (json!({"num_hidden_layers": -1}), "num_hidden_layers is -1"),
        (json!({"vocab_size": 99_999_999_999_i64}), "vocab_size is 99999999999"),
        (json!({"head_dim": 63}), "head_dim is 63, expected an even number"),
        (json!({"rope_theta": 0.0}), "rope_theta is 0"),
        (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps is -0.000001"),
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (json!({"rope_theta": null}), "rope_theta (or rope_parameters.rope_theta) is missing"),
        (json!({"hidden_size": "896"}), "config.json: hidden_size is \"896\", expected a whole number"),
        (json!({"num_hidden_layers": 24.5}), "num_hidden_layers is 24.5, expected a whole number"),
        (json!({"tie_word_embeddings": "true"}), "tie_word_embeddings is \"true\", expected true or false"),
        (json!({"rms_norm_eps": [1e-6]}), "rms_norm_eps is [1e-6], expected a number"),
        (json!({"model_type": 2}), "model_type is 2, expected a text"),
        (json!({"layer_types": "full_attention"}), "layer_types is \"full_attention\", expected a list of texts"),
        (json!({"rope_scaling": "yarn"}), "rope_scaling is \"yarn\", expected an object of keys"),
        (
            json!({"rope_parameters": {"rope_theta": "1e6"}}), // the base also has a rope_theta that is a number
            "rope_parameters.rope_theta is \"1e6\", expected a number",
        ),
        (json!({"layer_types": ["full_attention"]}), "layer_types has 1 entries, expected num_hidden_layers 24"),
    ];
    for (changes, expected) in cases {
        let message = refusal(qwen2(), &changes);
        assert!(message.starts_with("config.json: ") && message.contains(expected), "{message}");
    }
    assert!(Config::parse(b"{", Path::new("c")).is_err());
}
