"""Statistics of captions on a set small enough to count by hand."""

from __future__ import annotations

import json

import pytest

from evc_fast.data.captions import Caption, CaptionSet
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.statistics import bias_of, describe_captions

DICTIONARY = EmotionDictionary({"awe": ["amazed"], "joy": ["happy", "happily"], "surprise": ["amazed"]})


@pytest.mark.parametrize(
    ("bias", "pairs"),
    [
        ("emotional", [(1, 6), (1, 5), (2, 12), (3, 18), (1, 1)]),
        ("neutral", [(1, 7), (1, 9), (2, 13), (2, 19)]),
        ("factual", [(1, 10), (1, 11), (2, 20), (0, 1)]),
    ],
)
def test_rule_1_takes_its_thresholds_in(bias, pairs):
    assert {bias_of(emotion_words, words) for emotion_words, words in pairs} == {bias}


CAPTIONS = CaptionSet(
    [
        Caption("a", "A happy man dances."),  # 1 of 4: emotional
        Caption("a", "a man dances happily on a stage in town"),  # 1 of 9: neutral
        Caption("b", "a dog runs"),  # 0 of 3: factual
        Caption(
            "b", "an amazed dog stares at a happy cat while its owner calls from the old garden"
        ),  # 2 of 16: neutral
        Caption("c", "two women talk"),  # 0 of 3: factual
    ]
)


def test_counts_by_hand():
    found = describe_captions(CAPTIONS, DICTIONARY)
    assert (found.captions, found.videos, found.words) == (5, 3, 35)
    assert found.lengths == {3: 2, 4: 1, 9: 1, 16: 1} and found.longer == 1
    # a happy man dances happily on stage in town, dog runs, an amazed stares at cat while its owner calls from the old,
    # two women talk; "garden" is cut off
    assert found.vocabulary == 26
    assert found.emotion_words == {"happy": 2, "amazed": 1, "happily": 1}
    assert found.emotion_categories == {"joy": 3, "awe": 1, "surprise": 1}
    assert found.with_emotion == {"captions": 3, "videos": 2}
    assert found.bias["captions"] == {"factual": 2, "neutral": 2, "emotional": 1}
    # a: 2 of 13, b: 2 of 19, c: 0 of 3
    assert found.bias["videos"] == {"factual": 1, "neutral": 2, "emotional": 0}
    assert found.refined is None and found.dictionary_words == 3


def test_rule_2_moves_videos_whose_factual_captions_are_emotional():
    factual = CaptionSet(
        [
            Caption("b", "a dog runs over a field"),
            Caption("b", "an amazed dog"),
            Caption("c", "two women talk on a bench, one of them is happy"),  # 1 of 11: factual by rule 1
            Caption("elsewhere", "happy"),
        ]
    )
    found = describe_captions(CAPTIONS, DICTIONARY, factual=factual)
    assert found.bias == describe_captions(CAPTIONS, DICTIONARY).bias
    assert found.refined == {
        "captions": {"factual": 1, "neutral": 1, "emotional": 3},
        "videos": {"factual": 1, "neutral": 1, "emotional": 1},
    }
    with pytest.raises(ValueError, match="share no video id"):
        describe_captions(CAPTIONS, DICTIONARY, factual=CaptionSet([Caption("elsewhere", "a man")]))
    with pytest.raises(ValueError, match="no captions to describe"):
        describe_captions(CaptionSet([]), DICTIONARY)


def test_the_table_and_json_say_the_same():
    found = describe_captions(CAPTIONS, DICTIONARY, factual=CaptionSet([Caption("b", "an amazed dog")]))
    assert json.loads(found.to_json())["refined"] == found.refined
    lines = found.table(most=2).splitlines()
    assert lines[0] == "5 captions of 3 videos"
    assert lines[1] == "words a caption: 7.0 on average, 3 to 16; 1 captions are cut to 15"
    assert lines[2] == "vocabulary: 26 words; 3 of the dictionary's 3 emotion words"
    assert lines[3] == "with an emotion word: 60.0 % of the captions, 66.7 % of the videos"
    assert lines[4] == "emotion words: happy 2, amazed 1 and 1 more"
    assert lines[6] == "rule 1, captions: factual 40.0 %, neutral 40.0 %, emotional 20.0 %"
    assert lines[9] == "rule 2, videos: factual 33.3 %, neutral 33.3 %, emotional 33.3 %"
    plain = describe_captions(CaptionSet([Caption("c", "two women talk")]), DICTIONARY).table()
    assert "emotion words: none" in plain and "rule 2" not in plain
