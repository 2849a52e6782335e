use super::*;

fn parse(text: &str) -> Result<PeftConfig> {
    PeftConfig::parse(text.as_bytes(), Path::new("adapter_config.json"))
}

/// A LoRA on the queries, with one key added or changed.
fn with(key: &str, value: &str) -> Result<PeftConfig> {
    let mut keys: Map<String, Value> =
        serde_json::from_str("{\"peft_type\":\"LORA\",\"target_modules\":[\"q_proj\"]}").unwrap();
    keys.insert(key.to_owned(), serde_json::from_str(value).unwrap());
    parse(&Value::from(keys).to_string())
}

fn places(config: &PeftConfig) -> Vec<(usize, Proj)> {
    let all = (0..3).flat_map(|layer| Proj::ALL.map(|proj| (layer, proj)));
    all.filter(|(layer, proj)| config.targets.contain(*layer, *proj).unwrap()).collect()
}

#[test]
fn what_is_no_plain_lora_is_refused_by_name() {
    for (key, value) in [
        ("use_dora", "true"),
        ("use_qalora", "true"),
        ("lora_bias", "true"),
        ("bias", "\"all\""),
        ("bias", "\"lora_only\""),
        ("modules_to_save", "[\"score\"]"),
        ("modules_to_save", "[\"lm_head\", \"norm\"]"),
        ("trainable_token_indices", "[3]"),
        ("trainable_token_indices", "{\"embed_tokens\": [3]}"),
        ("target_parameters", "[\"x\"]"),
        ("layer_replication", "[[0, 1]]"),
        ("alora_invocation_tokens", "[5]"),
        ("arrow_config", "{}"),
        ("kasa_config", "{}"),
        ("megatron_config", "{}"),
        ("monteclora_config", "{}"),
        ("use_bdlora", "{}"),
        ("velora_config", "{}"),
        ("layers_pattern", "\"h\""),
        ("init_lora_weights", "\"pissa_niter_4\""),
        ("init_lora_weights", "\"olora\""),
        ("init_lora_weights", "\"corda\""),
        ("init_lora_weights", "\"lora_ga\""),
        ("init_lora_weights", "\"loftq\""),
        ("target_modules", "[\"q_proj\", \"model.embed_tokens\"]"),
        ("target_modules", "[\"c_attn\"]"),
        ("peft_type", "\"IA3\""),
        ("peft_type", "\"ADALORA\""),
        ("peft_type", "\"VERA\""),
        ("peft_type", "3"),
    ] {
        let message = with(key, value).unwrap_err().to_string();
        assert!(message.starts_with(&format!("adapter_config.json: {key} ")), "{message}");
        assert!(message.contains("expected") || message.contains("not supported"), "{message}");
        assert!(message.lines().count() == 1 && message.matches("hint: ").count() <= 1, "{message}");
    }
    let dora = with("use_dora", "true").unwrap_err().to_string();
    assert!(dora.contains("use_dora is true, which is not supported: DoRA also scales the rows"), "{dora}");
    let missing = parse("{\"r\":8}").unwrap_err().to_string();
    assert!(missing.ends_with("peft_type is missing, expected \"LORA\", as PEFT writes it"), "{missing}");
}

#[test]
fn an_adapter_of_mlx_is_told_as_that() {
    for key in ["\"fine_tune_type\": \"lora\"", "\"lora_parameters\": {\"rank\": 8, \"scale\": 20.0}"] {
        let message = parse(&format!("{{{key}}}")).unwrap_err().to_string();
        assert!(message.contains("it is an adapter of MLX, expected one of PEFT; hint: convert it"), "{message}");
    }
}

/// All keys of PEFT 0.21.2 with its own defaults, and keys of older versions and other trainers.
#[test]
fn the_defaults_of_peft_are_let_through_without_a_word() {
    let config = include_str!("../../../../../tests/golden/adapters/rslora/adapter_config.json");
    assert_eq!(parse(config).unwrap().remarks, [""; 0]);
    for (key, value) in [
        ("modules_to_save", "[]"),
        ("exclude_modules", "[]"),
        ("exclude_modules", "\"\""),
        ("layers_to_transform", "[]"),
        ("layers_pattern", "[]"),
        ("layers_pattern", "\"\""),
        ("rank_pattern", "null"),
        ("loftq_config", "{}"),
        ("eva_config", "{\"rho\": 2.0}"),
        ("init_lora_weights", "\"eva\""),
        ("init_lora_weights", "\"gaussian\""),
        ("init_lora_weights", "\"orthogonal\""),
        ("init_lora_weights", "\"mica\""),
        ("init_lora_weights", "false"),
        ("runtime_config", "{\"ephemeral_gpu_offload\": false}"),
        ("trainable_token_indices", "null"),
        ("ensure_weight_tying", "true"),
        ("unheard_of", "null"),
    ] {
        let config = with(key, value).unwrap();
        assert_eq!(config.remarks, [""; 0], "{key} {value}");
        assert_eq!(places(&config), [(0, Proj::Q), (1, Proj::Q), (2, Proj::Q)], "{key} {value}");
    }
}

#[test]
fn what_is_let_through_but_should_be_known_is_a_remark() {
    for (key, value, expected) in [
        ("unheard_of", "3", "it has keys that are not known here and are passed over: unheard_of"),
        ("fan_in_fan_out", "true", "fan_in_fan_out is true, which is without effect"),
        ("target_modules", "[\"q_proj\", \"query_key_value\"]", "also names \"query_key_value\", which no Qwen has"),
        (
            "target_modules",
            "\"(?=a)q_proj\"",
            "target_modules is \"(?=a)q_proj\", an expression that only Python reads",
        ),
        ("exclude_modules", "\"(?=a)q_proj\"", "exclude_modules is \"(?=a)q_proj\", an expression that only Python"),
    ] {
        let remarks = with(key, value).unwrap().remarks;
        assert!(remarks.len() == 1 && remarks[0].contains(expected), "{remarks:?}");
    }
}

#[test]
fn missing_keys_have_pefts_defaults() {
    let text = "{\"peft_type\":\"LORA\",\"target_modules\":\"ALL-linear\",\"layers_to_transform\":3}";
    let config = parse(text).unwrap().lora_of_any().unwrap();
    assert_eq!((config.rank, config.alpha, config.layers), (8, 8.0, Some(vec![3])));
    assert_eq!(config.target_modules, Proj::ALL);
    assert_eq!(with("r", "4").unwrap().lora_of_any().unwrap().layers, None);
    let beyond = with("layers_to_transform", "[500]").unwrap().lora_of_any().unwrap();
    assert_eq!(beyond.layers, Some(vec![500]));
}

#[test]
fn what_cannot_be_is_refused_by_its_key() {
    for (key, value, expected) in [
        ("r", "0", "the LoRA rank is 0"),
        ("r", "-9223372036854775808", "the LoRA rank is -9223372036854775808"),
        ("r", "\"8\"", "r is \"8\", expected a whole number"),
        ("lora_alpha", "-1", "the LoRA alpha is -1"),
        ("lora_dropout", "1.0", "the LoRA dropout is 1"),
        ("use_rslora", "1", "use_rslora is 1, expected true or false"),
        ("layers_to_transform", "[-1]", "layers_to_transform is [-1], expected a block's number"),
        ("target_modules", "3", "target_modules is 3, expected a list of modules or an expression"),
        ("target_modules", "[]", "target_modules is missing"),
        ("target_modules", "null", "target_modules is missing"),
        ("rank_pattern", "[3]", "rank_pattern is [3], expected an object"),
        ("rank_pattern", "{\"q_proj\":0}", "rank_pattern has 0 for q_proj, expected at least 1"),
        ("rank_pattern", "{\"q_proj\":\"a\"}", "rank_pattern has \"a\" for q_proj, expected a number"),
        ("alpha_pattern", "{\"q_proj\":-0.5}", "alpha_pattern has -0.5 for q_proj, expected a positive number"),
        (
            "alpha_pattern",
            "{\"(?<!k_)proj\":1}",
            "alpha_pattern has \"(?<!k_)proj\", expected a module's name or an expres",
        ),
    ] {
        let message = with(key, value).unwrap_err().to_string();
        assert!(message.starts_with("adapter_config.json: ") && message.contains(expected), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    let alpha = "{\"peft_type\":\"LORA\",\"lora_alpha\":1e999}";
    assert!(parse(alpha).unwrap_err().to_string().contains("number out of range"));
    let long = format!("\"{}\"", "é".repeat(500));
    assert!(with("r", &long).unwrap_err().to_string().len() < 300);
}

#[test]
fn blocks_and_modules_are_those_that_peft_finds() {
    let one = |text: &str| places(&parse(&format!("{{\"peft_type\":\"LORA\",{text}}}")).unwrap());
    assert_eq!(one(r#""target_modules":"q_proj""#).len(), 3);
    assert_eq!(one(r#""target_modules":["layers.1.mlp.up_proj"]"#), [(1, Proj::Up)]);
    // `layers_to_transform` limits names; a whole path contains its block.
    let paths = r#""target_modules":["model.layers.0.mlp.up_proj","v_proj"],"layers_to_transform":[2]"#;
    assert_eq!(one(paths), [(0, Proj::Up), (2, Proj::V)]);
    let pattern = r#""target_modules":["v_proj"],"layers_to_transform":1,"layers_pattern":["h","layers"]"#;
    assert_eq!(one(pattern), [(1, Proj::V)]);
    let excluded = r#""target_modules":["v_proj","o_proj"],"exclude_modules":["o_proj","0.self_attn.v_proj","score"]"#;
    assert_eq!(one(excluded), [(1, Proj::V), (2, Proj::V)]);
    let expressions = r#""target_modules":".*[qk]_proj","exclude_modules":".*\\.[01]\\..*""#;
    assert_eq!(one(expressions), [(2, Proj::Q), (2, Proj::K)]);
    assert_eq!(one(r#""target_modules":"layers\\.1.*""#), [], "an expression is of the whole path");
}
