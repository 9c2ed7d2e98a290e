//! However the bytes are cut, the text is the same as that of the whole.
use capstan_text::TextStream;
use proptest::prelude::*;

/// The rule itself: decode everything, then cut before the stop string that is complete first.
fn whole(bytes: &[u8], stops: &[String]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
    for end in ends {
        let starts = stops.iter().filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str())).map(|s| end - s.len());
        if let Some(start) = starts.min() {
            return text[..start].to_owned();
        }
    }
    text.into_owned()
}

fn streamed(bytes: &[u8], cuts: &[usize], stops: &[String]) -> String {
    let mut stream = TextStream::new(stops.to_vec());
    let mut out = String::new();
    let mut start = 0;
    let mut ends: Vec<usize> = cuts.iter().map(|c| c % (bytes.len() + 1)).collect();
    ends.sort_unstable();
    ends.push(bytes.len());
    for end in ends {
        let piece = stream.push(&bytes[start..end]);
        out.push_str(&piece.text);
        start = end;
        if piece.stopped {
            break;
        }
    }
    out + &stream.finish()
}

/// Bytes that make characters, halves of characters and the stop strings' letters likely.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        any::<u8>().prop_map(|b| vec![b]),
        "[abc]{1,3}".prop_map(String::into_bytes),
        any::<char>().prop_map(|c| c.to_string().into_bytes()),
        prop::sample::select(vec!["é", "😀", "\u{fffd}"]).prop_map(|s| s.as_bytes().to_vec()),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|v| v.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]
    #[test]
    fn chunking_does_not_matter(
        bytes in bytes(),
        cuts in prop::collection::vec(any::<usize>(), 0..24),
        stops in prop::collection::vec("[abcé😀\u{fffd}]{0,4}", 0..4),
    ) {
        let want = whole(&bytes, &stops);
        prop_assert_eq!(&streamed(&bytes, &cuts, &stops), &want);
        let every: Vec<usize> = (0..bytes.len()).collect();
        prop_assert_eq!(&streamed(&bytes, &every, &stops), &want);
    }
}

#[test]
fn holds_back_no_more_than_it_must() {
    let mut stream = TextStream::new(vec!["\n\nUser:".into()]);
    let push = |stream: &mut TextStream, bytes: &[u8]| stream.push(bytes).text;
    assert_eq!(push(&mut stream, b"Hi\n"), "Hi");
    assert_eq!(push(&mut stream, b"there"), "\nthere");
    assert_eq!(push(&mut stream, &"é".as_bytes()[..1]), "");
    assert_eq!(push(&mut stream, &"é".as_bytes()[1..]), "é");
    assert_eq!(push(&mut stream, &[0xff]), "\u{fffd}");
    assert_eq!(push(&mut stream, b"\n\nUser"), "");
    let last = stream.push(b": more");
    assert_eq!((last.text.as_str(), last.stopped), ("", true));
    assert_eq!(stream.push(b"x"), capstan_text::Piece { text: String::new(), stopped: true });
    assert_eq!(stream.finish(), "");
}
