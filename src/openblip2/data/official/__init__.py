"""The official annotation files of COCO, Flickr30K, NoCaps, VQAv2, OK-VQA and GQA."""
