//! Multipart bodies.

use super::*;

const TYPE: &str = "multipart/form-data; boundary=XX";

fn transcription(content_type: &str, body: impl Into<Vec<u8>>) -> Result<Call, CallError> {
    Call::from_multipart(Endpoint::AudioTranscriptions, content_type, Bytes::from(body.into()))
}

fn field(name: &str, value: &str) -> String {
    format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
}

fn form(fields: &[(&str, &str)]) -> String {
    fields.iter().map(|(name, value)| field(name, value)).collect::<String>() + "--XX--\r\n"
}

const FILE: &str = "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.mp3\"\r\nContent-Type: \
                    audio/mpeg\r\n\r\n\r\n\r\nID3\0model\r\n\r\n";

#[test]
fn the_model_is_found_and_replaced_wherever_it_stands() {
    let orders = [
        [field("model", "whisper-1"), FILE.to_owned(), field("stream", "true")],
        [FILE.to_owned(), field("stream", "true"), field("model", "whisper-1")],
        [field("stream", "true"), field("model", "whisper-1"), FILE.to_owned()],
    ];
    for order in orders {
        for (preamble, end) in
            [("", "--XX--\r\n"), ("to old readers\r\n", "--XX--"), ("", "--XX--\r\nepilogue")]
        {
            let body = format!("{preamble}{}{end}", order.concat());
            let call = transcription(TYPE, body.clone()).unwrap();
            assert_eq!((call.model(), call.streamed()), ("whisper-1", true));
            assert_eq!(call.prompt(), Prompt { audio: 1, ..Prompt::default() });
            assert_eq!(call.render(None, true), body.as_bytes());
            let want = body.replace("whisper-1", "large \"v3\"");
            assert_eq!(call.render(Some("large \"v3\""), true), want.as_bytes());
        }
    }
}

#[test]
fn fields_are_read() {
    let call = transcription(TYPE, form(&[("model", "m"), ("n", "3"), ("prompt", "a cat"), ("stream", "")]))
        .unwrap();
    assert_eq!((call.n(), call.prompt().text_bytes, call.streamed()), (3, 5, false));
    let body = FILE.replace("\"file\"", "\"image[]\"").repeat(2) + &form(&[("model", "m")]);
    let call = Call::from_multipart(Endpoint::ImagesEdits, TYPE, body.into()).unwrap();
    assert_eq!(call.prompt().images, 2);
}

#[test]
fn fields_that_cannot_be_are_refused() {
    let refuse = |fields: &[(&str, &str)]| transcription(TYPE, form(fields)).unwrap_err();
    assert_eq!(refuse(&[]), CallError::MissingModel);
    assert_eq!(refuse(&[("Model", "m")]), CallError::MissingModel);
    assert_eq!(refuse(&[("model", "")]), CallError::EmptyModel);
    assert_eq!(refuse(&[("model", &"m".repeat(257))]), CallError::LongModel(257));
    for param in ["model", "stream", "n", "prompt"] {
        assert_eq!(refuse(&[(param, "1"), ("x", ""), (param, "1")]), CallError::Duplicate(param));
    }
    assert_eq!(refuse(&[("model", "m"), ("stream", "maybe")]).param(), Some("stream"));
    assert_eq!(refuse(&[("model", "m"), ("n", "many")]).param(), Some("n"));
    let not_utf8 = form(&[("model", "m")]).into_bytes();
    let at = memchr::memmem::find(&not_utf8, b"\r\n\r\nm").unwrap() + 4;
    let not_utf8 = [&not_utf8[..at], b"\xff", &not_utf8[at + 1..]].concat();
    assert_eq!(transcription(TYPE, not_utf8).unwrap_err().param(), Some("model"));
    for header in
        ["; filename=\"m\"\r\n", "; filename*=utf-8''m\r\n", "\r\ncontent-transfer-encoding: base64\r\n"]
    {
        let body = form(&[("model", "m")]).replacen("\"model\"\r\n", &format!("\"model\"{header}"), 1);
        let error = transcription(TYPE, body).unwrap_err();
        assert!(matches!(error, CallError::WrongType { param: "model", .. }), "{header:?}: {error}");
    }
}

#[test]
fn the_boundary_is_read_as_the_standard_says() {
    let long = "b".repeat(70);
    for (parameter, boundary) in [
        ("boundary=XX", "XX"),
        ("charset=utf-8; BOUNDARY=\"XX\"", "XX"),
        ("boundary=\"a b'()+_,-./:=?c\" ; x=\";\"", "a b'()+_,-./:=?c"),
        ("boundary=----=_Part_1", "----=_Part_1"),
        (&format!("boundary={long}"), &long),
    ] {
        let body = form(&[("model", "m")]).replace("XX", boundary);
        let result = transcription(&format!("Multipart/Form-Data; {parameter}"), body);
        assert!(result.is_ok(), "{parameter}: {result:?}");
    }
    for content_type in [
        "application/json",
        "multipart/mixed; boundary=XX",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=\"XX",
        "multipart/form-data; boundary=\"XX \"",
        "multipart/form-data; boundary=\"X;X\"",
        "multipart/form-data; boundary=\"X\\\"X\"",
        "multipart/form-data; boundary=XX; boundary=YY",
        "multipart/form-data; boundary=XX YY",
        "multipart/form-data; boundary=Xé",
        &format!("multipart/form-data; boundary={long}b"),
    ] {
        let error = transcription(content_type, form(&[("model", "m")])).unwrap_err();
        assert!(matches!(error, CallError::NotAForm(_)), "{content_type}: {error}");
    }
}

#[test]
fn what_parsers_disagree_about_is_refused() {
    let good = form(&[("a", "1"), ("model", "m")]);
    let hidden = "\"\r\n\r\nx\r\n";
    let bad = [
        String::new(),
        "--XX\r\n".to_owned(),
        good.replace("--XX--", ""),
        good.replace("--XX--", "--XX-"),
        good.replace("\r\n", "\n"),
        good.replacen("1\r\n", "1\n", 1),
        good.replacen("1\r\n", "1 --XX\r\n\r\n", 1),
        good.replacen("1\r\n", "", 1),
        good.replacen("--XX\r\n", "--XXX\r\n", 1),
        format!("{good}--XX\r\n"),
        format!("{good}{}", form(&[("b", "2")])),
        format!(" {good}"),
        good.replacen("; name=\"a\"", "", 1),
        good.replacen("form-data", "attachment", 1),
        good.replacen("\"a\"", "\"a\"; name=\"model\"", 1),
        good.replacen("\"a\"", "\"a\"; name*=utf-8''model", 1),
        good.replacen("; name=\"a\"", "; a; name=\"model\"; name=\"b\"", 1),
        good.replacen("; name=\"a\"", "; filename=\"\\\"; name=\"model\"; x=\"\"; name=\"a\"", 1),
        good.replacen("\"a\"", "\"a\"; filename=\"x\\\"", 1),
        good.replacen("\"a\"", "\"a\" name=model", 1),
        good.replacen("\"a\"", "a\"b", 1),
        good.replacen("\"a\"", "\"mod\\el\"", 1),
        good.replacen("\"a\"", &format!("\"a\"\r\nContent-Disposition: form-data; name=\"model{hidden}"), 1),
        good.replacen("\"a\"", "\"a\";\r\n name=\"model\"", 1),
        good.replacen("\"a\"", "\"a\"\nContent-Disposition: form-data; name=\"model\"", 1),
        good.replacen("Content-Disposition", "Content-Disposition ", 1),
        good.replacen("Content-Disposition: form-data; name=\"a\"\r\n", "", 1),
        good.replacen("\"a\"", &format!("\"a\"\r\nX: {}", "x".repeat(9000)), 1),
        field("x", "").repeat(1025) + &good,
    ];
    assert!(transcription(TYPE, good).is_ok());
    for body in bad {
        let result = transcription(TYPE, body.clone());
        assert!(matches!(result, Err(CallError::NotAForm(_))), "{body:.300?}: {result:?}");
    }
}

proptest! {
    #[test]
    fn replacing_the_model_leaves_every_other_part(
        before in prop::collection::vec(any::<u8>(), 0..60), model in "[a-z]{1,9}", other in "[a-z]{1,9}",
    ) {
        let body = |model: &str| {
            [FILE.as_bytes(), &before, b"\r\n", field("model", model).as_bytes(), b"--XX--\r\n"].concat()
        };
        prop_assume!(memchr::memmem::find(&before, b"--XX").is_none());
        let call = transcription(TYPE, body(&model)).unwrap();
        prop_assert_eq!(call.model(), &model);
        prop_assert_eq!(call.render(Some(&other), false), body(&other));
    }

    #[test]
    fn broken_forms_do_not_panic(at: prop::sample::Index, byte in any::<u8>(), cut: prop::sample::Index) {
        let mut body = (FILE.to_owned() + &form(&[("model", "m"), ("n", "1")])).into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        let cut = cut.index(body.len() - 2); // the last CRLF may be missing
        let _ = transcription(TYPE, body.clone());
        prop_assert!(transcription(TYPE, body[..cut].to_vec()).is_err());
    }
}
