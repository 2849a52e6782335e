use super::*;

fn sampling(temperature: f64, constrain: Option<NumberGrammar>) -> Sampling {
    Sampling { temperature, max_new_tokens: 1, stop: vec![], constrain, batch: 1 }
}

#[test]
fn a_uniform_number_picks_the_token_whose_share_it_falls_into() {
    let logits = Tensor::from_slice(&[0.2_f32, 0.5, 0.3]).log().unsqueeze(0);
    let at = |uniform| draw(&logits, &sampling(1.0, None), &[&[]], &[uniform]).unwrap().tokens[0];
    assert_eq!([at(0.0), at(0.19), at(0.21), at(0.69), at(0.71), at(0.999_999)], [0, 0, 1, 1, 2, 2]);
    let greedy = draw(&logits, &sampling(0.0, None), &[&[]], &[0.9]).unwrap();
    assert_eq!(greedy.tokens, [1]);
    assert!((greedy.logprobs[0] - 0.5_f32.ln()).abs() < 1e-6);
    let cooled = draw(&logits, &sampling(0.5, None), &[&[]], &[0.5]).unwrap();
    let expected = 0.25 / (0.04 + 0.25 + 0.09);
    assert!((cooled.likelihoods[0] - expected).abs() < 1e-6 && (cooled.logprobs[0] - 0.5_f32.ln()).abs() < 1e-6);
}

#[test]
fn an_answer_out_of_what_is_no_number_is_refused() {
    let files = crate::ModelFiles::open("tiny-random").unwrap();
    let (model, chat) = (Qwen::load(&files, Device::Cpu, Kind::Float).unwrap(), Chat::from_files(&files).unwrap());
    let prompt = chat.prompt(None, "Hello").unwrap();
    let vector = Tensor::full([model.config.d_model], f64::NAN, (Kind::Float, Device::Cpu));
    let edit = crate::Edit {
        at: HookPoint::ResidPost(0),
        tokens: None,
        change: crate::Change::Add { vector, coefficient: 1.0 },
    };
    let condition = Condition { edits: vec![edit], ..Condition::default() };
    for temperature in [0.0, 0.7, 1.0] {
        let error = generate(
            &model,
            std::slice::from_ref(&prompt),
            &condition,
            &sampling(temperature, None),
            &[3],
            &mut |_| (),
        );
        assert!(error.err().unwrap().to_string().contains("look for values that overflow"), "{temperature}");
    }
}

#[test]
fn the_block_that_a_draw_falls_into_holds_the_token_it_falls_on() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for d_vocab in [3, BLOCK, 2 * BLOCK + 5, 5 * BLOCK] {
        let values: Vec<f32> = (0..d_vocab * 4).map(|_| rng.random_range(-4.0..4.0)).collect();
        let logits = Tensor::from_slice(&values).view([4, d_vocab]);
        for _ in 0..50 {
            let uniforms: Vec<f64> = (0..4).map(|_| rng.random()).collect();
            let found = draw_plain(&logits, &uniforms).unwrap();
            let probabilities = logits.softmax(-1, Kind::Double);
            let cumulated = probabilities.cumsum(-1, Kind::Double);
            for (row, (uniform, token)) in (0..).zip(uniforms.iter().zip(&found.tokens)) {
                let (up_to, p) = (cumulated.double_value(&[row, *token]), probabilities.double_value(&[row, *token]));
                // 1e-6: the draw is in f32.
                assert!(up_to - p - 1e-6 <= *uniform && *uniform <= up_to + 1e-6, "{uniform} at {token} of {d_vocab}");
                assert!((f64::from(found.likelihoods[row as usize]) - p).abs() < 1e-6);
                assert!((f64::from(found.logprobs[row as usize]) - p.ln()).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn one_stream_for_two_samples_of_a_prompt_is_refused() {
    let files = crate::ModelFiles::open("tiny-random").unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let prompt = Chat::from_files(&files).unwrap().prompt(None, "Hi").unwrap();
    let drawn = |temperature, streams: &[u64]| {
        let prompts = vec![prompt.clone(); streams.len()];
        let sampling = Sampling { max_new_tokens: 12, batch: 2, ..sampling(temperature, None) };
        generate(&model, &prompts, &Condition::default(), &sampling, streams, &mut |_| ())
    };
    let message = drawn(1.0, &[5, 6, 5]).unwrap_err().to_string();
    assert!(message.contains("2 of 3") && message.contains("a random stream of its own"), "{message}");
    let answers = drawn(1.0, &[5, 6, 7]).unwrap();
    assert!(answers[0] != answers[1] && answers[1] != answers[2]);
    let greedy = drawn(0.0, &[5, 6, 7]).unwrap();
    assert_eq!(greedy[0].ids, greedy[2].ids, "greedy answers may be equal");
}

#[test]
fn what_is_longer_than_the_context_is_refused_in_every_pass() {
    let mut files = crate::ModelFiles::open("tiny-random").unwrap();
    files.config.n_ctx = 40;
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let prompt = |length: i64| Sequence::of_ids((0..length).collect());
    let answers = |length, max_new_tokens| {
        let sampling = Sampling { max_new_tokens, batch: 2, ..sampling(0.0, None) };
        generate(&model, &[prompt(5), prompt(length)], &Condition::default(), &sampling, &[0, 1], &mut |_| ())
    };
    assert!(answers(36, 4).is_ok());
    let message = answers(37, 4).unwrap_err().to_string();
    assert_eq!(
        message,
        "prompt 1 is 37 tokens long and may be answered with 4 more (max_new_tokens), expected at most 40 together, \
         the model's context (max_position_embeddings or context_length)"
    );
    let too_long =
        "row 1 is 41 tokens long, expected at most 40, the model's context (max_position_embeddings or context_length)";
    let forward = |length| {
        let batch = crate::Batch::of(&[&prompt(3), &prompt(length)], Device::Cpu).unwrap();
        model.forward(&batch, &mut crate::Pass::default())
    };
    assert!(forward(40).is_ok());
    assert_eq!(forward(41).unwrap_err().to_string(), too_long);
    let score = |length| {
        let (short, long, condition) = (prompt(3), prompt(length), Condition::default());
        prefill(&model, &[(&short, &condition), (&long, &condition)], LAST, false, &mut |_| Ok(()))
    };
    assert!(score(40).is_ok());
    assert_eq!(score(41).unwrap_err().to_string(), too_long);
    // Token by token, in a cache with room for all of them.
    let mut cache = KvCache::new(&model.config, 1, 50, Kind::Float, Device::Cpu).unwrap();
    let mut step = |ids: &[i64]| {
        let batch = crate::Batch::from_ids(&[ids], Device::Cpu).unwrap();
        model.forward(&batch, &mut crate::Pass { kv_cache: Some(&mut cache), ..crate::Pass::default() }).map(drop)
    };
    step(&[7; 39]).unwrap();
    step(&[8]).unwrap();
    assert!(step(&[9]).unwrap_err().to_string().contains("row 0 is 41 tokens long, expected at most 40"));
}

#[test]
fn samples_that_no_independent_draws_repeat_are_refused() {
    let prompt = Sequence { ids: vec![1], classes: vec![], completion: 1..1, content_end: 1, ..Sequence::default() };
    let other = Sequence { ids: vec![2], ..prompt.clone() };
    let check = |answers: &[(i64, f64)], prompts: &[&Sequence]| {
        let prompts: Vec<Sequence> = prompts.iter().map(|prompt| (*prompt).clone()).collect();
        let answer = |id: &i64| Answer { ids: vec![*id], logprobs: vec![], stopped: true };
        let (ids, log_p): (Vec<i64>, Vec<f64>) = answers.iter().copied().unzip();
        are_independent(&prompts, &ids.iter().map(answer).collect::<Vec<_>>(), &log_p)
    };
    // Two long answers that are the same, of a probability of 1e-20 each.
    let message = check(&[(7, -46.0), (7, -46.0)], &[&prompt; 2]).unwrap_err().to_string();
    assert!(message.contains("is 2 of 2, at a probability of 1.1e-20 each"), "{message}");
    check(&[(7, -46.0), (7, -46.0)], &[&prompt, &other]).unwrap(); // one of each prompt
    check(&[(7, -46.0), (8, -46.0)], &[&prompt; 2]).unwrap();
    // An answer of probability 1/2 may come 20 times in 20 draws, but not 100 times in 100.
    check(&[(7, -0.69); 20], &[&prompt; 20]).unwrap();
    assert!(check(&[(7, -0.69); 100], &[&prompt; 100]).is_err());
    check(&[(7, 0.0); 1000], &[&prompt; 1000]).unwrap(); // a certain answer always repeats
    // Fifty of a hundred are expected at a probability of one half.
    let fair: Vec<(i64, f64)> = (0..100).map(|at| (at % 2, -0.69)).collect();
    check(&fair, &[&prompt; 100]).unwrap();
}

#[test]
fn a_token_of_no_probability_is_never_drawn() {
    let logits = Tensor::from_slice(&[0.0_f32, 0.0, f32::NEG_INFINITY, f32::NEG_INFINITY]).unsqueeze(0);
    for uniform in [0.0, 0.5, 0.999_999_999_9, 1.0] {
        assert!(draw(&logits, &sampling(1.0, None), &[&[]], &[uniform]).unwrap().tokens[0] < 2, "{uniform}");
    }
}

#[test]
fn the_grammar_lets_only_lists_of_numbers_through() {
    let grammar = NumberGrammar { digits: (0..10).collect(), comma: 10, end: 11, max_digits: 3, max_numbers: 2 };
    assert_eq!(grammar.allowed(&[]), (0..10).collect::<Vec<_>>());
    assert_eq!(grammar.allowed(&[1, 2, 3]), [11, 10]);
    assert_eq!(grammar.allowed(&[1, 10]), (0..10).collect::<Vec<_>>());
    assert_eq!(grammar.allowed(&[1, 10, 4, 4, 4]), [11], "two numbers are enough");
}

#[test]
fn streams_differ_by_seed_name_and_index() {
    let seeds = [
        stream_seed(0, "teacher", 0),
        stream_seed(0, "teacher", 1),
        stream_seed(0, "control", 0),
        stream_seed(1, "teacher", 0),
    ];
    assert_eq!(seeds.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
}
