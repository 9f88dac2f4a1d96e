"""Published results that the tables quote: mean absolute errors over Matbench's five folds."""

LEADERBOARD = "Matbench v0.1 leaderboard, https://matbench.materialsproject.org"
SOURCES = {
    "phonons": LEADERBOARD,
    "jdft2d": LEADERBOARD,
    "log_kvrh": f"{LEADERBOARD}, its submissions scored on the rows that are covered here",
    "log_gvrh": f"{LEADERBOARD}, its submissions scored on the rows that are covered here",
}
PUBLISHED = {
    "phonons": {
        "MEGNet": 28.8,
        "coNGN": 28.9,
        "ALIGNN": 29.5,
        "coGN": 29.7,
        "MODNet": 34.3,
        "SchNet": 39.0,
        "CrabNet": 55.1,
        "AMMExpress": 56.2,
        "CGCNN": 57.8,
        "RF-SCM/Magpie": 67.6,
    },
    "jdft2d": {
        "MODNet": 33.2,
        "coNGN": 36.2,
        "coGN": 37.2,
        "AMMExpress": 39.8,
        "SchNet": 42.7,
        "ALIGNN": 43.4,
        "CrabNet": 45.6,
        "CGCNN": 49.2,
        "RF-SCM/Magpie": 50.0,
        "MEGNet": 54.2,
    },
    "log_kvrh": {
        "coNGN": 0.0486,
        "ALIGNN": 0.0562,
        "AMMExpress": 0.0637,
        "CGCNN": 0.0707,
        "RF-SCM/Magpie": 0.0809,
    },
    "log_gvrh": {
        "coNGN": 0.0659,
        "ALIGNN": 0.0707,
        "AMMExpress": 0.0866,
        "CGCNN": 0.0890,
        "RF-SCM/Magpie": 0.1027,
    },
}
