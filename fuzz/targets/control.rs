//! A line on the control socket: a request reads the same after it is written again, a refusal has words.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::control::protocol::{Request, RequestLine, VERSION};

fuzz_target!(|line: &[u8]| match Request::parse(line) {
    Ok(request) => {
        let line = RequestLine { version: VERSION, request: request.clone() };
        let text = serde_json::to_vec(&line).expect("a request can be written");
        assert_eq!(Request::parse(&text), Ok(request));
    }
    Err(refusal) => assert!(!refusal.text.is_empty()),
});
